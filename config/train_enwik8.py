"""
A dense GPT of GPT-2-small's shape on the bytes of enwik8, for four minutes of training on one GPU.
With train_enwik8_moe.py it makes a comparison at equal time.

Parameters: 85.2M; 624 MFLOPs per token.
Tokens: as many as fit into 240 seconds, 32,768 a step.
To expect: not yet measured. The console and log.jsonl show bits per byte. On a CPU use flags to
make it smaller, as the tests do.
"""

out_dir = "out/enwik8"
wandb_project = "enwik8"
wandb_run_name = "dense"
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

learning_rate = 1e-3
min_lr = 0.0
warmup_iters = 100

eval_interval = 100  # not counted in max_seconds
eval_iters = 16
log_interval = 10
always_save_checkpoint = False
keep_last = 1
