"""
How should the load be balanced? Not at all; by a loss in each layer over a micro-batch, or over the
whole step (Qiu et al. 2025, arXiv 2501.11873); or by a bias instead of a loss (Wang et al. 2024,
arXiv 2408.15664). A step is 8 micro-batches of 4 sequences; at GPT-2's size, 40 of 12. A loss
pooled over layers, which rewards collapse, is not offered.
"""

_micro = {"batch_size": 4, "gradient_accumulation_steps": 8, "eval_iters": 512}
base = {
    "laptop": {"config": "config/train_plays_char_gpt2_moe.py"} | _micro,
    "gpt2": {"config": "config/train_gpt2_moe.py"},
}
_none = {"expert_load_balance_loss_coef": 0.0}
runs = {
    "dense": {"use_moe": False},
    "none": _none,
    "loss, micro-batch": {"expert_load_balance_loss_coef": 0.01, "balance_scope": "micro"},
    "loss, whole step": {"expert_load_balance_loss_coef": 0.01, "balance_scope": "global"},
    "bias 1e-4": _none | {"router_bias_update_rate": 1e-4},
    "bias 1e-3": _none | {"router_bias_update_rate": 1e-3},
    "bias 1e-2": _none | {"router_bias_update_rate": 1e-2},
}
seeds = [1, 2, 3]
baseline = "dense"
match = "active_flops"
