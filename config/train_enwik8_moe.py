"""
A Mixture-of-Experts GPT on the bytes of enwik8: the active FLOPs of train_enwik8.py, and the same
four minutes on one GPU. Each layer has 8 experts of half the dense width; a token visits 2.

Parameters: 255.1M, 85.2M of them active; 624 MFLOPs per token.
Tokens: as many as fit into 240 seconds, 32,768 a step.
To expect: not yet measured, see train_enwik8.py.
"""

from train_enwik8 import *

out_dir = "out/enwik8-moe"
wandb_run_name = "moe"

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 3072 / top_k
expert_load_balance_loss_coef = 0.01
