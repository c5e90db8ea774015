"""Tiny Shakespeare in GPT-2 tokens. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import prepare_shakespeare, run_main

if __name__ == "__main__":
    run_main(lambda: prepare_shakespeare(Path(__file__).resolve().parent, "gpt2"))
