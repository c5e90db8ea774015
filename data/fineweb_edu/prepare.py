"""A 10-billion-token sample of FineWeb-Edu in GPT-2 tokens. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run_main
from hub import prepare_from_hub

FOLDER = Path(__file__).resolve().parent

if __name__ == "__main__":
    run_main(
        lambda: prepare_from_hub(FOLDER, "HuggingFaceFW/fineweb-edu", "sample-10BT", 9_672_101)
    )
