"""
Which router? A softmax over the experts or a sigmoid for each (DeepSeek-V3, arXiv 2412.19437);
gates divided by their sum or not; with the z-loss or without it (Zoph et al. 2022, ST-MoE, arXiv
2202.08906).
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {
    "dense": {"use_moe": False},
    "softmax": {},
    "softmax, gates not normalised": {"norm_top_k": False},
    "softmax, z-loss": {"router_z_loss_coef": 1e-3},
    "sigmoid": {"router_score": "sigmoid"},
    "sigmoid, gates not normalised": {"router_score": "sigmoid", "norm_top_k": False},
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
