"""
A Mixture-of-Experts GPT on the bytes of enwik8 at the active FLOPs of train_enwik8.py, for the same four minutes on one GPU:
8 experts of half the dense width in each of 12 layers, 2 for each token.

Parameters: 255.1M, of which 85.2M are active; 624 MFLOPs per token. Tokens: as many as 240 seconds hold, 32,768 a step.
To expect: not yet measured; the console and log.jsonl give bits per byte. On a CPU shrink it by flags, as the tests do.
"""

out_dir = "out/enwik8-moe"
wandb_project = "enwik8"
wandb_run_name = "moe"
dataset = "enwik8"

max_seconds = 240.0  # and not max_iters: both halves get the same time
batch_size = 32
block_size = 1024
gradient_accumulation_steps = 1

n_layer = 12
n_head = 12
n_embd = 768
norm = "rmsnorm"
position = "rope"
mlp = "relu2"
qk_norm = True

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 3072 / top_k
expert_load_balance_loss_coef = 0.01

learning_rate = 1e-3
min_lr = 0.0
warmup_iters = 100

eval_interval = 100  # not counted in max_seconds
eval_iters = 16
log_interval = 10
always_save_checkpoint = False
keep_last = 1
