"""
GPT-2 on OpenWebText with 4 experts of full width in each layer; a token visits 1: the dense FLOPs,
more parameters.

Parameters: 293.5M, 123.6M of them active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 3.08 (published by an earlier project; not yet measured here).
"""

from train_gpt2 import *

out_dir = "out/gpt2-moe-4-experts"
wandb_run_name = "gpt2-moe-4-experts"

use_moe = True
num_experts = 4
top_k = 1
expert_load_balance_loss_coef = 0.02
