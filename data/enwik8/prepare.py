"""enwik8, the first 100,000,000 bytes of a Wikipedia dump, as bytes. See readme.md."""

import gzip
import hashlib
import io
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from common import BYTE_META, InputError, fetch_package, run_main
from writing import is_prepared, write_dataset

PACKAGE = "mingru-pytorch==0.2.1"  # its source archive holds enwik8.gz
ARCHIVE = "mingru_pytorch-0.2.1.tar.gz"
SHA256 = "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d"
MD5 = "a1fa5ffddb56f4953e226637dabbb36a"  # of the 100,000,000 bytes, as usually quoted
SPLITS = ("train", "val", "test")
CUTS = (90_000_000, 95_000_000)  # the usual ones, between the splits


def read_enwik8(folder):
    """The bytes, from `enwik8` or `enwik8.gz` beside this script or from the package index."""
    if (folder / "enwik8").exists():
        data = (folder / "enwik8").read_bytes()
    elif (folder / "enwik8.gz").exists():
        data = gzip.decompress((folder / "enwik8.gz").read_bytes())
    else:
        package = fetch_package(folder, PACKAGE, ARCHIVE, SHA256, "--no-binary=mingru-pytorch")
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            names = [name for name in archive.getnames() if name.endswith("data/enwik8.gz")]
            data = gzip.decompress(archive.extractfile(names[0]).read())
    if hashlib.md5(data).hexdigest() != MD5:
        raise InputError(
            f"this is not enwik8: {len(data)} bytes, expected 100,000,000 with md5 {MD5}"
        )
    return np.frombuffer(data, np.uint8)


def main():
    folder = Path(__file__).resolve().parent
    source = f"enwik8 md5:{MD5}"
    if is_prepared(folder, source):
        return
    parts = np.split(read_enwik8(folder), CUTS)
    pieces = [(split, part, len(part)) for split, part in zip(SPLITS, parts, strict=True)]
    write_dataset(folder, BYTE_META, pieces, source, SPLITS)


if __name__ == "__main__":
    run_main(main)
