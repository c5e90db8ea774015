"""train.py that saves in the background, as it does on a GPU. What it is given is train.py's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train


class BackgroundSaver(train.Saver):
    def __init__(self, out_dir, keep_last, background):
        super().__init__(out_dir, keep_last, background=True)


train.Saver = BackgroundSaver

if __name__ == "__main__":
    train.run_main(train.main)
