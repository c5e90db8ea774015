"""
Text to token ids and back.
"""

import numpy as np

from configurator import InputError

GPT2_VOCAB = 50257


class Tokenizer:
    """Text to token ids and back, as a meta.json describes: 'char', 'byte' or 'gpt2' (tiktoken)."""

    def __init__(self, meta):
        self.kind = meta["tokenizer"]
        self.vocab_size = meta["vocab_size"]
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
        elif self.kind == "unknown":
            raise InputError("the dataset says nothing of its tokenizer, only how many ids it has")
        elif self.kind != "byte":
            raise InputError(f"unknown tokenizer '{self.kind}', expected char, byte or gpt2")

    def encode(self, text):
        """str to a numpy array of ids. Raises InputError naming characters that have no id."""
        if self.kind == "gpt2":
            return np.array(self.bpe.encode(text, allowed_special={"<|endoftext|>"}), np.uint16)
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        if unknown := sorted(set(text) - set(self.chars)):
            raise InputError(f"characters outside the vocabulary: {' '.join(map(repr, unknown))}")
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        positions = np.searchsorted(self.codes, codes, sorter=self.by_code)
        return self.by_code[positions].astype(np.uint32)

    def encode_document(self, text):
        """One document of many to ids, with a separator at its end.

        The separator is <|endoftext|>, or a newline for characters and bytes. A special token that
        is spelled out in the text is plain text.
        """
        if self.kind == "gpt2":
            return np.array([*self.bpe.encode_ordinary(text), self.bpe.eot_token], np.uint16)
        return self.encode(text if text.endswith("\n") else text + "\n")

    @property
    def eot_token(self):
        """The id that ends a document; None if there is none."""
        return self.bpe.eot_token if self.kind == "gpt2" else None

    def to_bytes(self, ids):
        """A list of ids to UTF-8. A token may be part of a character."""
        if self.kind == "gpt2":
            return self.bpe.decode_bytes(ids)
        if self.kind == "byte":
            return bytes(ids)
        return "".join(self.chars[i] for i in ids).encode()

    def decode(self, ids):
        """A list of ids to str. Bytes that are not UTF-8 become the replacement character."""
        return self.to_bytes(ids).decode(errors="replace")
