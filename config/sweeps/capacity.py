"""
What does it cost to drop tokens (Gale et al. 2022, MegaBlocks, arXiv 2211.15841)? Capacity factors
of 1.0 and 1.25 against dropless training, 8 experts top-1. Dropped tokens are still computed here,
so the seconds show nothing.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
runs = {
    "dense": {"use_moe": False},
    "capacity 1.0": {"top_k": 1, "capacity_factor": 1.0},
    "capacity 1.25": {"top_k": 1, "capacity_factor": 1.25},
    "dropless": {"top_k": 1, "capacity_factor": 0.0},
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
