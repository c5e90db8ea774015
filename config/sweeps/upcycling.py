"""
What is the best use of a trained dense model and as many FLOPs again: train it on, or make a MoE of
it (Komatsuzaki et al. 2023, Sparse Upcycling, arXiv 2212.05055)? And how far does a MoE from
scratch get with those FLOPs, or with those of both stages?

On the laptop, train the dense model first:
    python train.py config/train_plays_char_gpt2_moe.py --use_moe=False --max_iters=1000 \
        --out_dir=out/plays-char-gpt2
"""

_often = {"eval_interval": 100}
_openai = {"bias": True, "mlp": "gelu_tanh", "learning_rate": 1e-4, "min_lr": 1e-5}
base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py", "max_iters": 1000} | _often,
    "gpt2": {"config": "config/train_gpt2_moe.py", "max_iters": 2000} | _often | _openai,
}
_steps = base[size]["max_iters"]
_source = {"laptop": "out/plays-char-gpt2", "gpt2": "gpt2"}[size]
_dense = {"upcycle_from": _source}
# the FLOPs of the dense model over those of a model with MLPs twice as wide
_fewer = {"laptop": 0.62, "gpt2": 0.715}[size]
runs = {
    "dense, continued": _dense | {"use_moe": False},
    # all at the dense model's active FLOPs; top-2 of copies has more, so it gets fewer steps
    "upcycled, 4 groups of 2 halves": _dense,
    "upcycled, 8 copies top-1": _dense | {"top_k": 1, "expert_dim": 0},
    "upcycled, 8 copies top-2": _dense | {"expert_dim": 0, "max_iters": round(_steps * _fewer)},
    "from scratch": {},
    "from scratch, with the dense model's FLOPs": {"max_iters": 2 * _steps},
    "dense from scratch, with both": {"use_moe": False, "max_iters": 2 * _steps},
}
seeds = [1, 2, 3]
baseline = "dense, continued"

_komatsuzaki = "Komatsuzaki et al. 2023, arXiv 2212.05055"
_he = "He et al. 2024, arXiv 2410.07524"
# fmt: off
_table = [  # two runs, why the first should have the lower loss, who says so, and their numbers
    ("upcycled, 4 groups of 2 halves", "dense, continued",
     "an upcycled model beats the dense one continued at equal FLOPs", _he,
     "Nemotron-4 15B and 1T tokens: MMLU 67.6% against 65.3%"),
    ("upcycled, 8 copies top-2", "dense, continued",
     "an upcycled model of copies beats the dense one continued at equal FLOPs", _komatsuzaki,
     "with half of the dense model's FLOPs"),
    ("upcycled, 4 groups of 2 halves", "from scratch",
     "an upcycled model beats a MoE from scratch with the dense model's FLOPs", _komatsuzaki,
     "abstract"),
    ("from scratch, with the dense model's FLOPs", "upcycled, 4 groups of 2 halves",
     "a MoE from scratch with all FLOPs of both stages beats the upcycled one",
     "to see what upcycling is worth", ""),
]
# fmt: on
_finding = {"metric": "val_loss", "expect": "lower"}
findings = [
    _finding | {"claim": claim, "source": source, "theirs": theirs, "runs": [run, other]}
    for run, other, claim, source, theirs in _table
]
