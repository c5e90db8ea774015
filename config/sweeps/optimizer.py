"""
AdamW or Muon, for a dense model and for a MoE? Each of the four at five learning rates, a factor of
1.5 apart, with one seed; at the best rate with three. `--size=gpt2_parts` is the same with GPT-2's
parts on a laptop.
"""

_tuned = {"beta2": 0.99, "min_lr": 0.0, "warmup_iters": 60}
base = {
    "laptop": {"config": "config/train_plays_char_moe.py", "max_iters": 800} | _tuned,
    "gpt2_parts": {"config": "config/train_plays_char_gpt2_moe.py", "max_iters": 600} | _tuned,
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
_small = size != "gpt2"  # noqa: F821 (tools/sweep sets size)
# the middle rate of the five
_rates = {
    "dense, adamw": 3e-3 if _small else 6e-4,
    "MoE, adamw": 3e-3 if _small else 6e-4,
    "dense, muon": 3e-3 if _small else 6e-4,
    "MoE, muon": 3e-3 if _small else 6e-4,
}
runs = {}
for _name, _middle in _rates.items():
    _model, _optimizer = _name.split(", ")
    _own = {"use_moe": _model == "MoE", "optimizer": _optimizer}
    _own["weight_decay"] = 0.4 if _small and _optimizer == "muon" else 0.1
    runs[_name] = _own | {"learning_rate": _middle}
    for _factor in (-2, -1, 1, 2):
        _rate = float(f"{_middle * 1.5**_factor:.3g}")
        runs[f"{_name}, rate {_rate:g}"] = _own | {"learning_rate": _rate, "seeds": [1]}
seeds = [1, 2, 3]
baseline = "dense, adamw"
match = "active_flops"
