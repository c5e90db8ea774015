"""
train_gpt2_moe.py with Muon for the matrices of the blocks.

Parameters: 293.5M, 123.7M of them active; 855 MFLOPs per token. Muon's iterations add 1.2% on one
GPU, and as each process repeats them, 9.5% on eight.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: not yet measured. On a laptop Muon is far ahead of AdamW at equal steps
(assets/RESULTS.md).
"""

out_dir = "out/gpt2-moe-muon"
wandb_project = "owt-10k"
wandb_run_name = "gpt2-moe-muon"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_embd = 768
use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 3072 / top_k
expert_load_balance_loss_coef = 0.02

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens a step. Fewer and larger
# micro-batches are faster if they fit. torchrun's processes share the 40, so their number must
# divide 40.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 10000
warmup_iters = 100
optimizer = "muon"
learning_rate = 6e-4  # AdamW's, because the updates are as large; not tuned
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 500
eval_iters = 40
log_interval = 10
