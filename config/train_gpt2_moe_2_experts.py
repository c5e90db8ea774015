"""
GPT-2 on OpenWebText with 2 experts of full width in each layer; a token visits 1: the dense FLOPs,
more parameters.

Parameters: 180.2M, 123.6M of them active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss between the dense 3.15 and the 3.08 of 4 experts (published by an
earlier project). Not yet measured with this code.
"""

out_dir = "out/gpt2-moe-2-experts"
wandb_project = "owt-10k"
wandb_run_name = "gpt2-moe-2-experts"
dataset = "openwebtext"

use_moe = True
num_experts = 2
top_k = 1
expert_load_balance_loss_coef = 0.02

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
