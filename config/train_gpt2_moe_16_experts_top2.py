"""
GPT-2 on OpenWebText with 16 experts of full width in each layer; a token visits 2: one and a half
times the dense FLOPs.

Parameters: 973.1M, 180.4M of them active; 1195 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: a validation loss near 2.95 (published by an earlier project; not yet measured here).
"""

from train_gpt2_moe_16_experts import *

out_dir = "out/gpt2-moe-16-experts-top2"
wandb_run_name = "gpt2-moe-16-experts-top2"
top_k = 2
