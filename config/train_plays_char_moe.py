"""
The quick start: a small MoE GPT on the characters of Shakespeare's plays, in a few minutes on a
laptop's CPU. Each of the 3 layers has 8 experts of half the dense width; a token visits 2. RMSNorm,
RoPE, squared ReLU, QK-norm.

Parameters: 1.8M, 0.6M of them active; 4.2 MFLOPs per token.
Tokens: 1.7M (850 steps of 2,048), 0.40 epochs.
To expect: a validation loss near 1.57 after two to three minutes on two cores, and a sample that
reads like a play.
"""

out_dir = "out/plays-char-moe"
wandb_project = "plays-char"
wandb_run_name = "moe"
dataset = "plays_char"

batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 850

n_layer = 3
n_head = 4
n_embd = 128
norm = "rmsnorm"
position = "rope"
mlp = "relu2"
qk_norm = True

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 512 / top_k
expert_load_balance_loss_coef = 0.01

optimizer = "muon"
learning_rate = 3e-3  # high, because the model is small and the run short
weight_decay = 0.4
beta2 = 0.99  # few tokens per step

lr_schedule = "wsd"
warmup_iters = 60
decay_share = 0.9  # in so short a run an early decay gave the lowest loss
min_lr = 0.0

eval_interval = 425
eval_iters = 64
log_interval = 25
