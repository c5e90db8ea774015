"""
How many experts? 1, 2, 4, 8 and 16; a token visits one, at the active FLOPs of the dense model.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {
    "dense": {"use_moe": False},
    "1 expert": {"num_experts": 1, "top_k": 1},
    "2 experts": {"num_experts": 2, "top_k": 1},
    "4 experts": {"num_experts": 4, "top_k": 1},
    "8 experts": {"num_experts": 8, "top_k": 1},
    "16 experts": {"num_experts": 16, "top_k": 1},
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
