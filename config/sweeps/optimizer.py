"""
AdamW or Muon, for a dense model and for a MoE? Each of the four at five learning rates or more, a
factor of 1.5 apart, with one seed; at one of them, the best on a laptop, with three.
`--size=gpt2_parts` is the same with GPT-2's parts on a laptop.
"""

_schedule = {"lr_schedule": "wsd", "decay_share": 0.9, "min_lr": 0.0}
base = {
    "laptop": {"config": "config/train_plays_char_moe.py"},
    "gpt2_parts": {"config": "config/train_plays_char_gpt2_moe.py"} | _schedule,
    "gpt2": {"config": "config/train_gpt2_moe.py"} | _schedule,
}
# learning rates; the first one has all seeds
_rates = {
    "dense, adamw": [1.33e-3, 5.93e-4, 8.89e-4, 2e-3, 3e-3, 4.5e-3],
    "MoE, adamw": [2e-3, 8.89e-4, 1.33e-3, 3e-3, 4.5e-3],
    "dense, muon": [3e-3, 1.33e-3, 2e-3, 4.5e-3, 6.75e-3],
    "MoE, muon": [3e-3, 1.33e-3, 2e-3, 4.5e-3, 6.75e-3],
}
_weight_decay = {"adamw": 0.1, "muon": 0.4}
if size == "gpt2_parts":
    _rates = {
        "dense, adamw": [1.01e-2, 1.33e-3, 2e-3, 3e-3, 4.5e-3, 6.75e-3, 1.52e-2],
        "MoE, adamw": [6.75e-3, 1.33e-3, 2e-3, 3e-3, 4.5e-3, 1.01e-2, 1.52e-2],
        "dense, muon": [1.01e-2, 2e-3, 3e-3, 4.5e-3, 6.75e-3, 1.52e-2],
        "MoE, muon": [1.01e-2, 2e-3, 3e-3, 4.5e-3, 6.75e-3, 1.52e-2],
    }
if size == "gpt2":
    _rates = {name: [6e-4, 2.7e-4, 4e-4, 9e-4, 1.35e-3] for name in _rates}
    _weight_decay["muon"] = 0.1
runs = {}
for _name, (_first, *_others) in _rates.items():
    _model, _optimizer = _name.split(", ")
    _own = {"use_moe": _model == "MoE", "optimizer": _optimizer}
    _own |= {"learning_rate": _first, "weight_decay": _weight_decay[_optimizer]}
    runs[_name] = _own
    for _rate in _others:
        runs[f"{_name}, rate {_rate:g}"] = _own | {"learning_rate": _rate, "seeds": [1]}
    if _optimizer == "adamw":  # does its own weight decay hold it back?
        runs[f"{_name}, weight decay 0.4"] = _own | {"weight_decay": 0.4, "seeds": [1]}
seeds = [1, 2, 3]
baseline = "dense, adamw"
match = "active_flops"
