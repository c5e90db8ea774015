"""
The dense twin of train_plays_char_moe.py: the same active FLOPs, tokens, schedule and validation
windows.

Parameters: 0.6M, all active; 4.2 MFLOPs per token.
Tokens: 1.7M (850 steps of 2,048), 0.40 epochs.
To expect: a validation loss near 1.60; the MoE's is 0.03 lower (three seeds).
"""

out_dir = "out/plays-char"
wandb_project = "plays-char"
wandb_run_name = "dense"
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
