"""
Text to token ids and back.
"""

import numpy as np

from configurator import InputError

GPT2_VOCAB = 50257
FILE = "tokenizer.json"  # the file of a 'bpe' tokenizer, in the format of Hugging Face
# special tokens that end a document, in the vocabularies of others
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "[EOS]")


class Tokenizer:
    """Text to token ids and back, as a meta.json describes: 'char', 'byte', 'gpt2' (by tiktoken) or
    'bpe' (a tokenizer.json)."""

    def __init__(self, meta):
        self.kind = meta["tokenizer"]
        self.vocab_size = meta["vocab_size"]
        self.bpe = None
        if self.kind == "char":
            self.chars = meta["chars"]
            self.codes = np.array([ord(char) for char in self.chars])
            self.by_code = self.codes.argsort()
        elif self.kind == "gpt2":
            import tiktoken  # late: it takes a while and only GPT-2 datasets need it

            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as error:  # the first call downloads; requests raises many kinds
                raise OSError(
                    "tiktoken cannot fetch the GPT-2 tokenizer; with no network, set "
                    f"TIKTOKEN_CACHE_DIR to a folder that holds it ({type(error).__name__})"
                ) from None
        elif self.kind == "bpe":
            self.bpe = BytePairs(meta["tokenizer_json"])
        elif self.kind == "unknown":
            raise InputError("the dataset says nothing of its tokenizer, only how many ids it has")
        elif self.kind != "byte":
            raise InputError(f"unknown tokenizer '{self.kind}', expected char, byte, gpt2 or bpe")

    def encode(self, text):
        """str to a numpy array of ids. Raises InputError naming characters that have no id."""
        if self.bpe:
            return self.bpe.encode_to_numpy(text, allowed_special="all")
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        if unknown := sorted(set(text) - set(self.chars)):
            raise InputError(f"characters outside the vocabulary: {' '.join(map(repr, unknown))}")
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        positions = np.searchsorted(self.codes, codes, sorter=self.by_code)
        return self.by_code[positions].astype(np.uint32)

    def encode_document(self, text, ends=True):
        """One document of many to ids, with a separator at its end.

        The separator is <|endoftext|> or the like, or else a newline. A special token that is
        spelled out in the text is plain text. ends: False for a part of a document that goes on.
        """
        if ends and self.eot_token is None and not text.endswith("\n"):
            text += "\n"
        if not self.bpe:
            return self.encode(text)
        ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        if ends and self.eot_token is not None:
            ids = np.append(ids, np.uint32(self.eot_token))
        return ids

    @property
    def eot_token(self):
        """The id that ends a document; None if there is none."""
        return self.bpe.eot_token if self.bpe else None

    def to_bytes(self, ids):
        """A list of ids to UTF-8. A token may be part of a character."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
        if self.kind == "byte":
            return bytes(ids)
        return "".join(self.chars[i] for i in ids).encode()

    def decode(self, ids):
        """A list of ids to str. Bytes that are not UTF-8 become the replacement character."""
        return self.to_bytes(ids).decode(errors="replace")


def with_file(meta, folder):
    """A tokenizer's description, as "tokenizer_json" with what is in its file if it has one. Raises
    OSError."""
    if not meta or meta["tokenizer"] != "bpe":
        return meta
    return meta | {"tokenizer_json": (folder / FILE).read_text(encoding="utf-8")}


def without_file(meta):
    """A tokenizer's description as JSON files hold it, and what goes into its file, or None."""
    meta = dict(meta or {})
    return meta, meta.pop("tokenizer_json", None)


class BytePairs:
    """Byte-level BPE from a tokenizer.json of Hugging Face, with the methods of a tiktoken.Encoding
    that Tokenizer calls.

    text: the file's contents. Raises InputError if it is no byte-level BPE, or if a text can come
    back as another one.
    """

    def __init__(self, text):
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
        ids = {token.content: id for id, token in added.items() if token.special}
        self.eot_token = next((ids[end] for end in ENDS if end in ids), None)
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

    def encode_to_numpy(self, text, allowed_special=(), disallowed_special=()):
        """str to an array of uint32. allowed_special: "all", or () to read such tokens as text."""
        self.built.encode_special_tokens = not allowed_special
        return np.array(self.built.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode_bytes(self, ids):
        return b"".join(self.bytes_of.get(id, b"") for id in ids)


def byte_letters():
    """{byte: the printable character that spells it} in a tokenizer.json, as in GPT-2's files:
    Latin-1 as it is, and for what cannot be seen the characters from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(unseen)}
