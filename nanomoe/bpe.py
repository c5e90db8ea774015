"""Byte pair encodings: GPT-2's by tiktoken, and a tokenizer.json by tokenizers."""

import numpy as np

from configurator import InputError

# special tokens that end a document, in the vocabularies of others
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[EOS]")


def load_gpt2():
    """The tiktoken.Encoding of GPT-2. Raises OSError."""
    import tiktoken  # late: only for GPT-2's tokens

    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # the first call downloads; requests raises many kinds
        raise OSError(
            "tiktoken cannot fetch the GPT-2 tokenizer; with no network, set TIKTOKEN_CACHE_DIR to "
            f"a folder that holds it ({type(error).__name__})"
        ) from None


class BytePairs:
    """Byte-level BPE from a tokenizer.json of Hugging Face, with the methods of a tiktoken.Encoding
    that Tokenizer calls.

    text: the file's contents. Raises InputError if it is no byte-level BPE, or if a text can come
    back as another one."""

    def __init__(self, text: str):
        import tokenizers  # late: only such datasets need it

        try:
            self.built = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing more specific
            raise InputError(f"it is not a tokenizer.json: {error}") from None
        self.built.no_truncation()  # nothing is cut off or added
        self.built.no_padding()
        self.built.post_processor = None
        kind = type(self.built.model).__name__
        if kind != "BPE":
            raise InputError(f"it is a {kind} tokenizer, expected BPE on bytes")
        self.built.model.dropout = None  # the same ids every time
        added = self.built.get_added_tokens_decoder()
        if strange := [t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word]:
            raise InputError(f"it loses bytes: the token {strange[0]!r} takes spaces away")
        tokens = {token: id for token, id in self.built.get_vocab().items() if id not in added}
        letters = {letter: byte for byte, letter in byte_letters().items()}
        if strange := sorted(token for token in tokens if not set(token) <= letters.keys()):
            raise InputError(f"it is not BPE on bytes: {strange[0]!r} is no spelling of bytes")
        if self.built.normalizer:
            raise InputError("it loses bytes: it has a normalizer, which changes the text")
        if missing := sorted(letters.keys() - tokens.keys()):
            raise InputError(f"it loses bytes: 0x{letters[missing[0]]:02x} has no token")
        self.bytes_of = {id: bytes(letters[c] for c in token) for token, id in tokens.items()}
        self.bytes_of |= {id: token.content.encode() for id, token in added.items()}
        special = {token.content: id for id, token in added.items() if token.special}
        ends = [special[end] for end in ENDS if end in special]
        self.eot_token = ends[0] if ends else None
        self.vocab_size = max(self.bytes_of) + 1
        self.check_lossless()

    def check_lossless(self):
        """Raises InputError if a text comes back as another one, as after a normalization."""
        chars = "".join(map(chr, [*range(0x800), *range(0x2000, 0x3100), *range(0x1F600, 0x1F650)]))
        for text in (*chars, chars, "e\u0301 \ufb01 \u2126", " a  b\n\n c\r\n", "<|endoftext|>"):
            found = self.decode_bytes(self.encode_to_numpy(text).tolist())
            if found != text.encode():
                found = found.decode(errors="replace")
                raise InputError(f"it loses bytes: {text[:9]!r} comes back as {found[:9]!r}")

    def encode_to_numpy(self, text: str, allowed_special=(), disallowed_special=()) -> np.ndarray:
        """An array of uint32. allowed_special: "all", or () to read such tokens as text."""
        self.built.encode_special_tokens = not allowed_special
        return np.array(self.built.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.bytes_of.get(id, b"") for id in ids)


def byte_letters() -> dict[int, str]:
    """{byte: the printable character that spells it} in a tokenizer.json, as in GPT-2's files:
    Latin-1 as it is, and for what cannot be seen the characters from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(unseen)}
