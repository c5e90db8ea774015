"""
Does a MoE beat a dense model? Three comparisons: at equal active FLOPs and tokens; with a dense
model of as many parameters in all, which uses each of them for every token; and at equal wall-clock
time, where the learning rate falls over that time.
"""

base = {
    "laptop": {"config": "config/train_plays_char_moe.py", "eval_interval": 170},
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
_seconds = {"laptop": 600.0, "gpt2": 4 * 3600.0}[size]
_timed = {"max_seconds": _seconds, "max_iters": 10**6, "seeds": [1, 2, 3, 4, 5, 6]}
_as_many = {"match": "total_params", "match_to": "8 experts top-2"}
runs = {
    "dense": {"use_moe": False},
    "8 experts top-2": {},
    "dense, as many parameters": {"use_moe": False, **_as_many},
    "dense, by time": {"use_moe": False, **_timed},
    "8 experts top-2, by time": _timed,
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
