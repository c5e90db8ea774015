"""
Few large experts or many small ones (Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066)? The same
parameters and active FLOPs, cut into 8, 16, 32 and 64 experts; a token visits 1, 2, 4 and
8. With top_k = 1 the gate is the softmax's own score, which is small at first; with more, the gates
sum to 1. So from 16 top-2 on only the granularity differs.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {
    "dense": {"use_moe": False},
    "8 top-1": {"num_experts": 8, "top_k": 1},
    "16 top-2": {"num_experts": 16, "top_k": 2},
    "32 top-4": {"num_experts": 32, "top_k": 4},
    "64 top-8": {"num_experts": 64, "top_k": 8},
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
