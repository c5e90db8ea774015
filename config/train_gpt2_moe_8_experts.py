"""
GPT-2 on OpenWebText with 8 experts of full width in each layer; a token visits 1: the dense FLOPs,
more parameters.

Parameters: 520.0M, 123.7M of them active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 3.04 (published by an earlier project; not yet measured here).
"""

from train_gpt2_moe_4_experts import *

out_dir = "out/gpt2-moe-8-experts"
wandb_run_name = "gpt2-moe-8-experts"
num_experts = 8
