"""
GPT-2 on OpenWebText with 2 experts of full width in each layer; a token visits 1: the dense FLOPs,
more parameters.

Parameters: 180.2M, 123.6M of them active; 855 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss between the dense 3.15 and the 3.08 of 4 experts; not yet measured.
"""

from train_gpt2_moe_4_experts import *

out_dir = "out/gpt2-moe-2-experts"
wandb_run_name = "gpt2-moe-2-experts"
num_experts = 2
