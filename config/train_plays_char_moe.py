"""
The quick start: a small MoE GPT on the characters of Shakespeare's plays, in a few minutes on a
laptop's CPU. Each of the 3 layers has 8 experts of half the dense width; a token visits 2. RMSNorm,
RoPE, squared ReLU, QK-norm.

Parameters: 1.8M, 0.6M of them active; 4.2 MFLOPs per token.
Tokens: 1.7M (850 steps of 2,048), 0.40 epochs.
To expect: a validation loss near 1.57 after two to three minutes on two cores, and a sample that
reads like a play.
"""

from train_plays_char import *

out_dir = "out/plays-char-moe"
wandb_run_name = "moe"

use_moe = True
num_experts = 8
top_k = 2
expert_dim = -1  # the dense MLP's 512 / top_k
expert_load_balance_loss_coef = 0.01
