"""
Published findings about Mixture-of-Experts, tried on a laptop: which of them hold at four layers of
128?

16 models of GPT-2's parts with 3 seeds each, on 1.2M characters of the plays. Unless a name says
otherwise: 8 experts top-2 at the dense model's active FLOPs, load-balance loss 0.01. It takes under
an hour on two cores. A finding compares two runs, seed by seed: the metric of the first should be
lower or higher than that of the second.
"""

base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"},
    "gpt2": {"config": "config/train_gpt2_moe.py", "expert_load_balance_loss_coef": 0.01},
}
_few = {
    "laptop": {"batch_size": 4, "gradient_accumulation_steps": 8, "eval_iters": 512},
    "gpt2": {},
}[size]
# fmt: off
_shazeer = "Shazeer et al. 2017, arXiv 1701.06538, table 6"
_switch = "Fedus et al. 2021, Switch Transformers, arXiv 2101.03961"
_deepseek = "Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066"
_free = "Wang et al. 2024, loss-free balancing, arXiv 2408.15664"
_megablocks = "Gale et al. 2022, MegaBlocks, arXiv 2211.15841"
_st_moe = "Zoph et al. 2022, ST-MoE, arXiv 2202.08906"
# a run and its settings (none: it stands above), and what is expected of it: metric, lower or
# higher, than which run; the claim, who makes it, and their numbers
_table = [
    ("dense", {"use_moe": False}),
    ("8 top-2", {}, "val_loss", "lower", "dense",
     "a MoE has a lower loss than the dense model at equal active FLOPs", _megablocks,
     "64 experts top-1 at GPT-2's size: -0.15 to -0.26"),
    ("4 top-2", {"num_experts": 4}),
    ("16 top-2", {"num_experts": 16}, "val_loss", "lower", "4 top-2",
     "more experts at equal active FLOPs lower the loss", _switch,
     "lower with every doubling up to 256"),
    ("32 top-8", {"num_experts": 32, "top_k": 8}, "val_loss", "lower", "8 top-2",
     "finer experts, and more of them for each token, lower the loss", _deepseek,
     "with a shared one, on the Pile: 1.867 to 1.808"),
    ("31 top-7, 1 shared", {"num_experts": 31, "top_k": 7, "num_shared_experts": 1},
     "val_loss", "lower", "32 top-8",
     "a shared expert lowers the loss (OLMoE, arXiv 2409.02060, found it slightly worse)",
     _deepseek, "switching it off: 1.808 to 2.414"),
    ("capacity 1.0", {"capacity_factor": 1.0}, "val_loss", "higher", "8 top-2",
     "dropping tokens beyond a capacity of 1.0 costs quality", _megablocks,
     "gain over dense -0.15 when dropping, -0.26 dropless"),
    ("unbalanced", {"expert_load_balance_loss_coef": 0.0}, "max_vio", "higher", "8 top-2",
     "without balancing, the load becomes uneven", _shazeer,
     "busiest expert 17.8 times the mean, 1.1 to 1.5 with it"),
    ("unbalanced", None, "val_loss", "higher", "8 top-2",
     "without balancing, the loss is higher", _shazeer, "perplexity 39.8, 35.6 to 35.7 with it"),
    ("loss-free", {"expert_load_balance_loss_coef": 0.0, "router_bias_update_rate": 1e-3},
     "max_vio", "lower", "8 top-2",
     "a bias without a loss balances better than the loss", _free, "MaxVio 0.72 to 0.04"),
    ("loss-free", None, "val_loss", "lower", "8 top-2",
     "a bias without a loss has a lower language-model loss", _free, "perplexity 9.56 to 9.50"),
    ("loss 0.1", {"expert_load_balance_loss_coef": 0.1}, "max_vio", "lower", "8 top-2",
     "ten times the coefficient balances better", _free, "its figure 2"),
    ("loss 0.1", None, "val_loss", "higher", "8 top-2",
     "ten times the coefficient costs quality", _free, "its figure 2"),
    ("micro-batch loss", {"balance_scope": "micro", **_few}, "val_loss", "higher", "8 top-2",
     "balancing each micro-batch instead of the whole step costs quality",
     "Qiu et al. 2025, arXiv 2501.11873", "perplexity 8.167 with 4 sequences, 8.062 with 32"),
    ("z-loss", {"router_z_loss_coef": 1e-3}, "z_loss", "lower", "8 top-2",
     "the z-loss keeps the log-sum-exp of the router's logits small", _st_moe,
     "3 of 3 runs stable, 4 of 6 without"),
    ("z-loss", None, "logit_norm", "lower", "8 top-2",
     "the z-loss makes the router's logits smaller", _st_moe, "as above"),
    ("8 top-2", None, ["first_layer_vio", "other_layers_vio"], "higher", "8 top-2",
     "the first layer is the slowest to balance", _deepseek, "so its first layer is dense"),
    ("sigmoid", {"router_score": "sigmoid"}, "val_loss", "lower", "8 top-2",
     "sigmoid scores learn faster than a softmax", "Nguyen et al. 2024, arXiv 2405.13997",
     "fewer samples for the same error"),
    # the papers' own settings, with one expert for each token; added after the others had been run
    ("8 top-1", {"top_k": 1}, "val_loss", "lower", "dense",
     "a single expert for each token is enough to beat the dense model", _switch,
     "the same loss up to 7 times as fast"),
    ("32 top-4", {"num_experts": 32, "top_k": 4}, "val_loss", "lower", "8 top-1",
     "finer experts lower the loss, starting from one for each token", _deepseek, "as above"),
    ("8 top-1, capacity 1.0", {"top_k": 1, "capacity_factor": 1.0}, "val_loss", "higher", "8 top-1",
     "dropping beyond a capacity of 1.0 costs quality, with one expert for each token",
     _megablocks, "gain over dense -0.15 when dropping, -0.26 dropless"),
]
# fmt: on
runs, findings = {}, []
for _name, _settings, *_expected in _table:
    if _settings is not None:
        runs[_name] = _settings
    if _expected:
        _metric, _direction, _other, _claim, _source, _theirs = _expected
        _finding = {"claim": _claim, "source": _source, "theirs": _theirs}
        _finding |= {"runs": [_name, _other], "metric": _metric, "expect": _direction}
        findings.append(_finding)
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
