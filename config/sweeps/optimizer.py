"""
AdamW or Muon, for a dense model and for a MoE? Each of the four at five or more learning rates, a
factor of 1.5 apart, with one seed; the best rate of each with three. `--size=gpt2_parts` does the
same with GPT-2's parts.
"""

base = {
    "laptop": {"config": "config/train_plays_char_moe.py", "max_iters": 800, "warmup_iters": 60},
    "gpt2_parts": {"config": "config/train_plays_char_gpt2_moe.py"},
}[size] | {"beta2": 0.99, "min_lr": 0.0}  # noqa: F821 (tools/sweep sets size)
_models = {"MoE": {}, "dense": {"use_moe": False}}
_rates = {
    "muon": [2e-3, 3e-3, 4.5e-3, 6.75e-3, 1e-2],
    "adamw": [1.33e-3, 2e-3, 3e-3, 4.5e-3, 6.75e-3],
}
runs = {}
for _optimizer, _some in _rates.items():
    for _rate in _some:
        for _model, _own in _models.items():
            runs[f"{_model}, {_optimizer}, rate {_rate:g}"] = _own | {
                "optimizer": _optimizer,
                "learning_rate": _rate,
            }
seeds = [1]
baseline = "dense, adamw, rate 0.003"
match = "active_flops"
