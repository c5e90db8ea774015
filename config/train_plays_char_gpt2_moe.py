"""
The base of most sweeps in config/sweeps on a laptop: a MoE of GPT-2's parts on the characters of
Shakespeare's plays. Each of the 4 layers has 8 experts of half the dense width; a token visits 2.
`--use_moe=False` makes its dense twin.

Parameters: 2.4M, 0.8M of them active; 5.2 MFLOPs per token.
Tokens: 1.2M (600 steps of 2,048), 0.28 epochs.
To expect: a validation loss near 2.04, the dense twin's near 2.13 (three seeds), in two minutes on
one core. With today's parts (train_plays_char_moe.py) a model learns much faster, dense or MoE.
"""

out_dir = "out/plays-char-gpt2-moe"
wandb_project = "plays-char"
wandb_run_name = "gpt2-moe"
dataset = "plays_char"

batch_size = 32
block_size = 64
gradient_accumulation_steps = 1
max_iters = 600

n_layer = 4
n_head = 4
n_embd = 128

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 512 / top_k
expert_load_balance_loss_coef = 0.01

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per step
warmup_iters = 60

eval_interval = 150
eval_iters = 64
log_interval = 10
