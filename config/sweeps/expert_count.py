"""
How many experts? 1, 2, 4, 8 and 16, of which each token visits one, at the active FLOPs of the dense model.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {"dense": {"use_moe": False}}
runs |= {f"{n} expert{'s' * (n > 1)}": {"num_experts": n, "top_k": 1} for n in (1, 2, 4, 8, 16)}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
