"""
A small dense GPT on the characters of tiny Shakespeare: nanoGPT's recipe for a GPU.

Parameters: 10.6M, all active; 70.9 MFLOPs per token.
Tokens: 82M (5,000 steps of 16,384), 82 epochs.
To expect: nanoGPT reports a validation loss of 1.4697 on a GPU (not yet measured with this code).
nanoGPT's recipe for a CPU is 4 layers of 128; assets/LOG.md has its time and loss with this code:
    python train.py config/train_shakespeare_char.py --eval_iters=20 --log_interval=100 \
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 \
        --dropout=0.0
"""

out_dir = "out/shakespeare-char"
wandb_project = "shakespeare-char"
wandb_run_name = "dense"
dataset = "shakespeare_char"

batch_size = 64
block_size = 256
gradient_accumulation_steps = 1
max_iters = 5000

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per step
warmup_iters = 100

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits, so keep the best
