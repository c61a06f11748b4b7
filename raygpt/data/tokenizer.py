"""Text to tokens and back, with what ships in the package: nothing is ever downloaded.

``gpt2`` is GPT-2's byte-pair encoding (Radford et al. 2019, section 2.2) over the
ranks in ``raygpt/assets``; ``gpt2-N`` stops its merges when there are N tokens, which
suits models that are too small for 50,257; ``bytes`` has one token for each byte.  All
are ``tiktoken`` encodings.  What it gives up: special tokens in text.  The string
``<|endoftext|>`` in a document is ordinary text; only the program sets the token.
"""

import base64
import hashlib
import re
from functools import cache
from importlib import resources

import numpy as np
import tiktoken

from raygpt.errors import UserError

TOKENIZERS = ("gpt2", "gpt2-N", "bytes")
GPT2_TOKENS, BYTE_TOKENS = 50_257, 257
"""Tokens of ``gpt2`` and ``bytes``, which take a while to load."""
END_OF_TEXT = "<|endoftext|>"
_FIRST = re.compile(r"gpt2-([1-9][0-9]*)")
_GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# Kept here rather than taken from tiktoken_ext: its spelling may change with a release of
# tiktoken, and with it the hash of the tokenizer that every corpus records.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_BYTES_PATTERN = r"[\s\S]"
_SLICE = 2**18
_CUT = re.compile(r"(?<=\S)[ \n]")


class Tokenizer:
    """A ``tiktoken.Encoding`` with a hash; made with :func:`load_tokenizer`."""

    def __init__(self, encoding: tiktoken.Encoding, ranks: dict[bytes, int], pattern: str) -> None:
        self._encoding = encoding
        self.name: str = encoding.name
        self.n_vocab: int = encoding.n_vocab
        """Tokens there are; ids run from 0 to n_vocab - 1, all in use."""
        self.eot: int = encoding.eot_token
        """The end-of-text token, which stands before every document."""
        self.dtype: np.dtype = np.dtype(np.uint16 if self.n_vocab <= 2**16 else np.uint32)
        self.hash: str = _hash(ranks, {END_OF_TEXT: self.eot}, pattern)
        """sha256 hex over ranks, special tokens and pattern."""

    def encode(self, text: str) -> np.ndarray:
        """Ordinary tokens of ``text``, 1-D of :attr:`dtype`; lone surrogates become U+FFFD.

        Long text goes through the encoding in slices of about 2**18 characters, which bounds
        memory and the encoding's stack.  A slice ends before a space or newline that follows
        another character: no match of the patterns crosses such a place, so the tokens are those
        of the whole.  Only where 2**18 characters hold no such place is a match cut in two.
        """
        if self.name == "bytes":
            return self.encode_bytes(_without_surrogates(text).encode())
        slices = []
        start = 0
        while start < len(text):
            cut = _CUT.search(text, start + _SLICE, start + 2 * _SLICE)
            end = cut.start() if cut else start + 2 * _SLICE
            part = _without_surrogates(text[start:end])
            slices.append(self._encoding.encode_to_numpy(part, disallowed_special=()))
            start = end
        return np.concatenate(
            [np.empty(0, self.dtype), *slices], dtype=self.dtype, casting="unsafe"
        )

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Tokens of UTF-8 ``data``; ``bytes`` keeps invalid bytes, ``gpt2`` makes them U+FFFD."""
        if self.name == "bytes":
            return np.frombuffer(data, np.uint8).astype(self.dtype)
        return self.encode(data.decode("utf-8", errors="replace"))

    def decode(self, tokens: list[int] | np.ndarray) -> str:
        """Text of ``tokens``, which lie below :attr:`n_vocab`; invalid UTF-8 becomes U+FFFD."""
        return self._encoding.decode([int(token) for token in tokens], errors="replace")

    def tokens(self) -> list[bytes]:
        """The bytes of every ordinary token, by id."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self.eot)]

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, (n_vocab,) int64; the end of text has none."""
        return np.array([*map(len, self.tokens()), 0], np.int64)


@cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called ``name``, one object per process.

    Raises:
        UserError: there is no such tokenizer, or the package's vocabulary file is damaged.
    """
    if name == "gpt2":
        ranks, pattern = _gpt2_ranks(), _GPT2_PATTERN
    elif first := _FIRST.fullmatch(name):
        ranks, pattern = _first_ranks(int(first[1]), name), _GPT2_PATTERN
    elif name == "bytes":
        ranks, pattern = {bytes([byte]): byte for byte in range(256)}, _BYTES_PATTERN
    else:
        raise UserError(f"unknown tokenizer {name!r}; known are {', '.join(TOKENIZERS)}")
    encoding = tiktoken.Encoding(
        name,
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )
    return Tokenizer(encoding, ranks, pattern)


def _gpt2_ranks() -> dict[bytes, int]:
    file = resources.files("raygpt") / "assets" / "r50k_base.tiktoken"
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != _GPT2_SHA256:
        raise UserError(f"{file} is damaged: its sha256 is not {_GPT2_SHA256}; install raygpt anew")
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _first_ranks(n_vocab: int, name: str) -> dict[bytes, int]:
    """Those of a vocabulary of ``n_vocab`` tokens: a token is merged from two of lower rank, so the
    first ones are a byte-pair encoding, too."""
    if not BYTE_TOKENS <= n_vocab < GPT2_TOKENS:
        raise UserError(
            f"tokenizer {name!r}: N of gpt2-N must lie in {BYTE_TOKENS}..{GPT2_TOKENS - 1}; the "
            "whole vocabulary is gpt2"
        )
    ranks = _gpt2_ranks().items()
    return {token: rank for token, rank in ranks if rank < n_vocab - 1}  # and the end


def _hash(ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> str:
    digest = hashlib.sha256()
    tokens = [*ranks.items(), *((name.encode(), rank) for name, rank in specials.items())]
    for token, rank in sorted(tokens, key=lambda item: item[1]):
        digest.update(b"%d %d %s\n" % (rank, len(token), token))
    digest.update(pattern.encode())
    return digest.hexdigest()


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
