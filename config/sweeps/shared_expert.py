"""
Does it help to make one expert a shared one, which every token visits? Dai et al. 2024
(DeepSeekMoE, arXiv 2401.06066) say yes, Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060) no. At
equal parameters and active FLOPs.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {
    "dense": {"use_moe": False},
    "16 top-4": {"num_experts": 16, "top_k": 4},
    "15 top-3, 1 shared": {"num_experts": 15, "top_k": 3, "num_shared_experts": 1},
    "14 top-2, 2 shared": {"num_experts": 14, "top_k": 2, "num_shared_experts": 2},
    "32 top-8": {"num_experts": 32, "top_k": 8},
    "31 top-7, 1 shared": {"num_experts": 31, "top_k": 7, "num_shared_experts": 1},
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
