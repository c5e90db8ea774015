"""
GPT-2 on OpenWebText with 16 experts of full width in each layer; a token visits 1: the dense FLOPs,
more parameters.

Parameters: 973.1M, 123.7M of them active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 3.02 (published by an earlier project; not yet measured here).
"""

from train_gpt2_moe_4_experts import *

out_dir = "out/gpt2-moe-16-experts"
wandb_run_name = "gpt2-moe-16-experts"
num_experts = 16
