"""
GPT-2 (124M) on OpenWebText: the dense baseline of the train_gpt2_moe*.py configs, with the same
tokens and schedule.

Parameters: 123.6M, all active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 3.15 (published by an earlier project; not yet measured here).
nanoGPT's full run of 300B tokens: --max_iters=600000 --warmup_iters=2000
"""

out_dir = "out/gpt2"
wandb_project = "owt-10k"
wandb_run_name = "gpt2"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_embd = 768

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
