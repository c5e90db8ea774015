"""
A dataset's tokenizer in the files of Hugging Face: tokenizer.json and what belongs to it.
"""

import itertools
import json
from pathlib import Path

from nanomoe.bpe import byte_letters
from nanomoe.tokenizer import FILE, Meta, Tokenizer


def find_merge(token, ranks):
    """The two parts that byte-pair encoding merges into a token, after all merges of lower rank."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def build_tokenizer(meta):
    """A tokenizers.Tokenizer that gives the same ids as the Tokenizer of this meta."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    if meta["tokenizer"] == "bpe":
        return HFTokenizer.from_str(meta["tokenizer_json"])
    if meta["tokenizer"] == "char":
        built = HFTokenizer(models.WordLevel({char: i for i, char in enumerate(meta["chars"])}))
        built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        built.decoder = decoders.Fuse()
        return built
    is_gpt2 = meta["tokenizer"] == "gpt2"
    ranks = {bytes([byte]): byte for byte in range(256)}
    if is_gpt2:
        ranks = Tokenizer(meta).bpe._mergeable_ranks
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merged = [find_merge(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    merges = [(spelled[a], spelled[b]) for a, b in merged]
    built = HFTokenizer(models.BPE({spelled[token]: ranks[token] for token in ranks}, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)
    built.decoder = decoders.ByteLevel()
    if is_gpt2:
        built.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
    return built


def write_tokenizer(path: Path, meta: Meta, block_size: int) -> None:
    """Write the files of the tokenizer that a meta.json describes into a folder."""
    built = build_tokenizer(meta)
    text = meta.get("tokenizer_json") or built.to_str(pretty=True)
    (path / FILE).write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if meta["tokenizer"] == "gpt2":
        built.model.save(str(path))  # vocab.json and merges.txt, for older readers
    end = Tokenizer(meta).eot_token
    if end is not None:
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), built.id_to_token(end))
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
