r"""
Write a checkpoint and its tokenizer as a model of Hugging Face's transformers.

$ python -m tools.export_hf out/plays-char-swiglu hf/plays
$ python -m tools.export_hf out/plays-char-moe hf/plays-moe --remote_code=True
$ python sample.py --init_from=hf/plays

The class is GPT-2, Llama, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE or GLM-4-MoE: the one that
computes the same. If none does (experts with GPT-2's LayerNorm, for example), the error names the
options to change. --remote_code=True exports any model: it copies nanoMoE's own code beside the
weights, for transformers' option trust_remote_code=True.

The folder gets its name after a check: transformers computes the same logits on random tokens, and
nanoMoE reads the weights back bit for bit.
"""

from pathlib import Path

from configurator import InputError, configure
from nanomoe.device import limit_threads
from nanomoe.errors import run_main
from nanomoe.hf import classes
from nanomoe.hf.write import export, import_transformers
from nanomoe.load import load

# -----------------------------------------------------------------------------
# settings; the first two can be given without --key=
out_dir = ""  # a run (its newest checkpoint), a checkpoint folder, or what else sample.py takes
folder = ""  # the new folder
dataset = ""  # take the tokenizer from this dataset and not from the one the checkpoint names
remote_code = False  # export any model, with nanoMoE's own code beside the weights
# -----------------------------------------------------------------------------


def main():
    configure(globals(), positional=("out_dir", "folder"))
    if not out_dir or not folder:
        raise InputError("expected a checkpoint and a new folder, as in: out/plays-char hf/plays")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: choose another name")
    limit_threads()
    import_transformers()
    loaded = load(out_dir)
    loaded.build_model()  # weights that do not fit their config are an error here
    family = classes.REMOTE
    if not remote_code:
        try:
            family = classes.matching_class(loaded.config, loaded.weights)
        except InputError as error:
            more = "; or export it with --remote_code=True (see --help)"
            raise InputError(f"{error}{more}") from None
    print(f"{loaded.path}, after {loaded.step:,} steps: {family.name} ({family.about})")
    try:
        meta = loaded.tokenizer_meta(dataset)
    except InputError as error:
        if dataset:
            raise
        meta = None
        print(f"without a tokenizer: {error}")
    difference = export(loaded, folder, family, meta)
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    tokenizer = f", with the tokenizer '{meta['tokenizer']}'" if meta else ""
    print(f"logits in transformers differ by at most {difference:.1e}; weights are bit-identical")
    print(f"{folder}: {size:,.1f} MB{tokenizer}")


if __name__ == "__main__":
    run_main(main)
