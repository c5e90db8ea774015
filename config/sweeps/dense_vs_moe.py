"""
Does a MoE beat a dense model? At equal active FLOPs and tokens; against a dense model with as many parameters in all, which
pays for each of them; and at equal wall-clock time, where the learning rate falls over the time that there is.
"""

base = {
    "laptop": {
        "config": "config/train_plays_char_gpt2_moe.py",
        "max_iters": 1000,
        "eval_interval": 200,
    },
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
_timed = {"max_seconds": {"laptop": 150.0, "gpt2": 4 * 3600.0}[size], "max_iters": 10**6}  # noqa: F821 (tools/sweep sets it)
runs = {
    "dense": {"use_moe": False},
    "8 experts top-2": {},
    "dense, as many parameters": {
        "use_moe": False,
        "match": "total_params",
        "match_to": "8 experts top-2",
    },
    "dense, by time": {"use_moe": False, **_timed},
    "8 experts top-2, by time": _timed,
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
