"""
OpenAI's GPT-2 (124M) upcycled to a MoE, on OpenWebText. Each layer gets 8 experts of half the dense
width: the two halves of its MLP, 4 times; a token visits 2. So the first loss is GPT-2's own, see
nanomoe/upcycle.py. `--use_moe=False` trains the dense model on instead; config/sweeps/upcycling.py
compares the two.

Parameters: 293.8M, 123.7M of them active; 855 MFLOPs per token.
Tokens: 0.98B (2,000 steps of 491,520).
To expect: not yet measured.
"""

init_from = "auto"
upcycle_from = "gpt2"
# no n_layer, n_head, n_embd: the model is as large as the one it comes from
out_dir = "out/upcycle-gpt2-moe"
wandb_project = "owt-upcycle"
wandb_run_name = "gpt2-8-experts"
dataset = "openwebtext"

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 3072 / top_k
expert_load_balance_loss_coef = 0.01

# 491,520 tokens a step, see train_gpt2.py
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 2000
warmup_iters = 100
learning_rate = 1e-4
min_lr = 1e-5
weight_decay = 1e-1

eval_interval = 200
eval_iters = 40
log_interval = 10
