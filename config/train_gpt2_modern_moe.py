"""
A MoE GPT of GPT-2's size with the parts of today's models, on OpenWebText: RMSNorm, RoPE,
grouped-query attention, SwiGLU, QK-norm. Its fine-grained experts follow DeepSeek-V3: 64 in each
layer, an eighth of the dense width each. A token visits 7 of them and 1 shared expert. The router's
scores are sigmoids, and a bias balances the load. tools/export_hf exports it to the transformers
class for GLM-4.5.

Parameters: 518.2M, 114.7M of them active; 802 MFLOPs per token.
Tokens: 4.9B (10,000 steps of 491,520).
To expect: not yet measured.
"""

from train_gpt2 import *

out_dir = "out/gpt2-modern-moe"
wandb_run_name = "gpt2-modern-moe"

norm = "rmsnorm"
position = "rope"
n_kv_head = 4
mlp = "swiglu"
qk_norm = True
use_moe = True
num_experts = 64
top_k = 7
num_shared_experts = 1
expert_dim = -1  # the dense SwiGLU's 2048 / (7 + 1)
router_score = "sigmoid"
router_bias_update_rate = 1e-3
expert_load_balance_loss_coef = 1e-4  # small: the bias does the balancing, as in DeepSeek-V3
