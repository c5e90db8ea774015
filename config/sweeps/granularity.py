"""
Few large experts or many small ones (Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066)? The same parameters and active FLOPs cut
into 8, 16, 32 and 64 experts, of which each token visits 1, 2, 4 and 8. With top_k = 1 a gate is the softmax's score itself,
small at first; with more, gates sum to 1: from 16 top-2 on only the granularity differs.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {"dense": {"use_moe": False}}
runs |= {f"{8 * k} top-{k}": {"num_experts": 8 * k, "top_k": k} for k in (1, 2, 4, 8)}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
