"""
The dense twin of train_plays_char_moe.py: the same active FLOPs, tokens, schedule and validation
windows.

Parameters: 0.8M, all active; 5.6 MFLOPs per token.
Tokens: 1.6M (800 steps of 2,048), 0.38 epochs.
To expect: a validation loss near that of the MoE in so short a run (1.665 against 1.661 after 1000
steps, three seeds).
"""

out_dir = "out/plays-char"
wandb_project = "plays-char"
wandb_run_name = "dense"
dataset = "plays_char"

batch_size = 16
block_size = 128
gradient_accumulation_steps = 1
max_iters = 800

n_layer = 4
n_head = 4
n_embd = 128
norm = "rmsnorm"
position = "rope"
mlp = "relu2"
qk_norm = True

learning_rate = 3e-3  # high, because the model is small and the run short
min_lr = 1e-4
beta2 = 0.99  # few tokens per step
warmup_iters = 60

eval_interval = 400
eval_iters = 64
log_interval = 25
