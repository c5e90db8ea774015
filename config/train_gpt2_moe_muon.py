"""
train_gpt2_moe.py with Muon for the matrices of the blocks.

Parameters: 293.5M, 123.7M of them active; 855 MFLOPs per token. Muon's iterations add 1.2% on one
GPU, and as each process repeats them, 9.5% on eight.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: not yet measured. On a laptop Muon is far ahead of AdamW at equal steps
(assets/RESULTS.md).
"""

from train_gpt2_moe import *

out_dir = "out/gpt2-moe-muon"
wandb_run_name = "gpt2-moe-muon"

optimizer = "muon"
learning_rate = 6e-4  # AdamW's, because the updates are as large; not tuned
