"""
GPT-2 medium (350M) on OpenWebText. A MoE of GPT-2 size would like to reach its loss at a third of
its FLOPs.

Parameters: 353.6M, all active; 2423 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 2.96, which an earlier project published for this recipe. Not yet
measured with this code.
"""

out_dir = "out/gpt2-medium"
wandb_project = "owt-10k"
wandb_run_name = "gpt2-medium"
dataset = "openwebtext"

n_layer = 24
n_head = 16
n_embd = 1024

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens a step. Fewer and larger
# micro-batches are faster if they fit. torchrun's processes share the 40, so their number must
# divide 40.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 10000
warmup_iters = 100
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 500
eval_iters = 40
log_interval = 10
