"""
The main job: a Mixture-of-Experts GPT-2 on OpenWebText, at the active FLOPs of the dense one
(train_gpt2.py). Each layer has 8 experts of half the dense width; a token visits 2.

Parameters: 293.5M, 123.7M of them active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss below the dense model's 3.15. Not yet measured with this code.
"""

from train_gpt2 import *

out_dir = "out/gpt2-moe"
wandb_run_name = "gpt2-moe"

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 3072 / top_k
expert_load_balance_loss_coef = 0.02
