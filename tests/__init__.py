import pytest

# asserts of these files show their values too, as those of the tests themselves
for name in ("helpers", "hf_models", "report_runs", "sweeps", "traps", "xray_pages"):
    pytest.register_assert_rewrite(f"tests.{name}")
