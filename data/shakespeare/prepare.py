"""Tiny Shakespeare in GPT-2 tokens. See readme.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import GPT2_META, run_main, tiny_shakespeare
from writing import is_prepared, write_texts


def main():
    folder = Path(__file__).resolve().parent
    source, texts = tiny_shakespeare(folder)
    if not is_prepared(folder, source):
        write_texts(folder, GPT2_META, texts, source)


if __name__ == "__main__":
    run_main(main)
