"""
A small MoE GPT on the characters of tiny Shakespeare, at the active FLOPs of
train_shakespeare_char.py, for a GPU. Each layer has 8 experts of half the dense width; a token
visits 2. RMSNorm, RoPE, squared ReLU, QK-norm.

Parameters: 31.9M, 10.7M of them active; 71.0 MFLOPs per token.
Tokens: 82M (5,000 steps of 16,384), 82 epochs.
To expect: not yet measured at this size. On two CPU cores this command reaches 1.59 in about a
minute, where nanoGPT's recipe for a CPU reaches 1.91 in the same time (see assets/LOG.md):
    python train.py config/train_shakespeare_char_moe.py --n_layer=2 --moe_stride=2 --n_head=4 \
        --n_embd=128 --dropout=0.0 --block_size=128 --batch_size=12 --num_experts=4 \
        --optimizer=muon --weight_decay=0.4 --learning_rate=3e-3 --lr_schedule=wsd \
        --decay_share=0.9 --min_lr=0 --warmup_iters=60 --max_iters=1020 --eval_interval=1020 \
        --eval_iters=400 --log_interval=100
"""

from train_shakespeare_char import *

out_dir = "out/shakespeare-char-moe"
wandb_run_name = "moe"

norm = "rmsnorm"
position = "rope"
mlp = "relu2"
qk_norm = True

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 1536 / top_k
expert_load_balance_loss_coef = 0.01
