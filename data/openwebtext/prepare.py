"""OpenWebText in GPT-2 tokens. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import run_main
from hub import prepare_from_hub

if __name__ == "__main__":
    run_main(
        lambda: prepare_from_hub(
            Path(__file__).resolve().parent,
            "Skylion007/openwebtext",
            None,
            num_documents=8_013_769,
            val_every=2000,
            instead="python data/fineweb_edu/prepare.py",
        )
    )
