"""
A Mixture-of-Experts GPT on the bytes of enwik8: the active FLOPs of train_enwik8.py, and the same
four minutes on one GPU. Each of the 12 layers has 8 experts of half the dense width; a token visits
2.

Parameters: 255.1M, 85.2M of them active; 624 MFLOPs per token.
Tokens: as many as fit into 240 seconds, 32,768 a step.
To expect: not yet measured. The console and log.jsonl show bits per byte. On a CPU use flags to
make it smaller, as the tests do.
"""

out_dir = "out/enwik8-moe"
wandb_project = "enwik8"
wandb_run_name = "moe"
dataset = "enwik8"

max_seconds = 240.0  # instead of max_iters: both models get the same time
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
