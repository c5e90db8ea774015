"""
GPT-2 medium (350M) on OpenWebText. A MoE of GPT-2 size would like to reach its loss at a third of
its FLOPs.

Parameters: 353.6M, all active; 2423 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 2.96 (published by an earlier project; not yet measured here).
"""

from train_gpt2 import *

out_dir = "out/gpt2-medium"
wandb_run_name = "gpt2-medium"

n_layer = 24
n_head = 16
n_embd = 1024
