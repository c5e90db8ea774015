import pytest

# Failed asserts in these files show their values, as those in test files do.
for name in ("helpers", "hf_models", "report_runs", "sweeps", "traps"):
    pytest.register_assert_rewrite(f"tests.{name}")
