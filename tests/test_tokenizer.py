"""The tokenizers against published facts, and properties that any text must have."""

import hashlib
from importlib import resources

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from raygpt.data import tokenizer as module
from raygpt.data.tokenizer import load_tokenizer
from raygpt.errors import UserError

HELLO = "Hello, I'm a language model,"


@pytest.fixture(scope="module")
def shakespeare() -> str:
    return (resources.files("raygpt") / "assets" / "tinyshakespeare.txt").read_text()


def test_gpt2_facts() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert (gpt2.name, gpt2.n_vocab, gpt2.eot, gpt2.dtype) == ("gpt2", 50257, 50256, np.uint16)
    assert gpt2.encode(HELLO).tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode(HELLO).dtype == np.uint16
    assert gpt2.decode([15496, 11, 314, 50256]) == "Hello, I<|endoftext|>"
    assert gpt2.encode("").tolist() == []


def test_bytes_facts() -> None:
    tokens = load_tokenizer("bytes")
    assert (tokens.n_vocab, tokens.eot, tokens.dtype) == (257, 256, np.uint16)
    assert tokens.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokens.encode_bytes(b"\xff\x00").tolist() == [255, 0]
    assert tokens.decode(np.array([97, 0xC3, 0xA9, 256], np.uint16)) == "aé<|endoftext|>"
    assert tokens.decode([97, 0xC3, 98]) == "a\ufffdb"


def test_the_first_of_gpt2_are_a_tokenizer_too(shakespeare: str) -> None:
    first, gpt2 = load_tokenizer("gpt2-1024"), load_tokenizer("gpt2")
    assert (first.name, first.n_vocab, first.eot) == ("gpt2-1024", 1024, 1023)
    text = shakespeare[:20_000] + "漢 \n\n1,234"
    tokens = first.encode(text)
    assert first.decode(tokens) == text and 0 <= tokens.min() <= tokens.max() < first.eot
    assert 2 * len(tokens) < len(text.encode()) < 4 * len(gpt2.encode(text))
    for token in map(int, tokens[:1000]):
        assert first.decode([token]) == gpt2.decode([token])
    # Where nothing that is left out was merged, the tokens are those of the whole vocabulary.
    assert first.encode(" the is").tolist() == gpt2.encode(" the is").tolist() == [262, 318]


def test_with_all_merges_but_one_only_its_token_is_missing() -> None:
    gpt2, first = load_tokenizer("gpt2"), load_tokenizer("gpt2-50256")
    last = gpt2.decode([50255])
    assert gpt2.encode(last).tolist() == [50255] and len(first.encode(last)) == 2
    assert first.encode(HELLO).tolist() == gpt2.encode(HELLO).tolist()


def test_without_merges_every_byte_is_a_token() -> None:
    first = load_tokenizer("gpt2-257")
    assert len(first.encode("naïve\n")) == len("naïve\n".encode())
    assert first.decode(first.encode("naïve\n")) == "naïve\n"


@pytest.mark.parametrize("name", ["gpt2-256", "gpt2-50257", "gpt2-0"])
def test_as_many_as_there_are(name: str) -> None:
    with pytest.raises(UserError, match=name):
        load_tokenizer(name)


@given(st.text())
def test_lengths_are_those_of_the_text(text: str) -> None:
    for name in ("gpt2", "gpt2-1024", "bytes"):
        tokenizer = load_tokenizer(name)
        lengths = tokenizer.byte_lengths()
        assert len(lengths) == tokenizer.n_vocab and lengths[tokenizer.eot] == 0
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_special_strings_in_text_are_ordinary() -> None:
    gpt2, tokens = load_tokenizer("gpt2"), load_tokenizer("bytes")
    text = "a<|endoftext|>b"
    assert gpt2.encode(text).tolist() == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]
    assert tokens.encode(text).tolist() == list(text.encode())


def test_sizes_are_known_without_loading() -> None:
    assert load_tokenizer("gpt2").n_vocab == module.GPT2_TOKENS
    assert load_tokenizer("bytes").n_vocab == module.BYTE_TOKENS


def test_hashes_are_pinned() -> None:
    # Corpora record them: a change makes every corpus unreadable and must be meant.
    assert load_tokenizer("gpt2").hash == (
        "4d2cea7c350888425663427e4791f46981f2ffbaef6e7bd767ac924ddf96ee3e"
    )
    assert load_tokenizer("gpt2-1024").hash == (
        "f0174cdef3d5af5bd06e93210ab810a1f903f110b45ac6e3b0e0856594c8174f"
    )
    assert load_tokenizer("bytes").hash == (
        "0178e394db4835ad4295596f1859fb67e931d499419cd30e2b1e1fe2b6862ff0"
    )


def test_embedded_text_has_the_known_number_of_tokens(shakespeare: str) -> None:
    tokens = load_tokenizer("gpt2").encode(shakespeare)
    assert len(tokens) == 338_025
    assert load_tokenizer("gpt2").decode(tokens) == shakespeare


def test_slices_give_the_tokens_of_the_whole(
    shakespeare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = load_tokenizer("gpt2")
    text = shakespeare[:20_000] + "\n \n\t x  y\r\n\r\n  " * 300
    whole = gpt2.encode(text)
    monkeypatch.setattr(module, "_SLICE", 100)  # this text has a place to cut every 100 characters
    assert np.array_equal(gpt2.encode(text), whole)
    monkeypatch.setattr(module, "_SLICE", 1)  # hard cuts: other tokens, the same text
    assert gpt2.decode(gpt2.encode(text)) == text


def test_endless_runs_do_not_break_the_encoder() -> None:
    gpt2 = load_tokenizer("gpt2")
    for text in (" " * 1_200_000 + "x", "\n" * 1_200_000, "7" * 600_000):
        assert gpt2.decode(gpt2.encode(text)) == text


@given(st.text())
def test_round_trip(text: str) -> None:
    for name in ("gpt2", "gpt2-1024", "bytes"):
        tokens = load_tokenizer(name)
        assert tokens.decode(tokens.encode(text)) == text
        assert np.array_equal(tokens.encode(text), tokens.encode_bytes(text.encode()))


@given(st.text(alphabet=st.sampled_from("aZ 1.\n\t'sé漢\u00a0\r_"), max_size=60))
def test_cutting_place_is_exact(text: str) -> None:
    gpt2 = load_tokenizer("gpt2")
    whole = gpt2.encode(text).tolist()
    for cut in module._CUT.finditer(text):
        head, tail = text[: cut.start()], text[cut.start() :]
        assert gpt2.encode(head).tolist() + gpt2.encode(tail).tolist() == whole


def test_pattern_agrees_with_tiktokens_own(shakespeare: str) -> None:
    theirs = tiktoken.Encoding(
        "theirs", pat_str=r50k_pat_str, mergeable_ranks=module._gpt2_ranks(), special_tokens={}
    )
    text = shakespeare[:50_000] + " it's  12 ½ é漢\t\n\n x\u00a0!!\r\n  'LL we'll _a_"
    assert load_tokenizer("gpt2").encode(text).tolist() == theirs.encode_ordinary(text)


def test_lone_surrogates_become_replacement_characters() -> None:
    for name in ("gpt2", "bytes"):
        tokens = load_tokenizer(name)
        assert tokens.decode(tokens.encode("a\ud800b")) == "a\ufffdb"


def test_unknown_name() -> None:
    with pytest.raises(
        UserError, match=r"^unknown tokenizer 'gpt5'; known are gpt2, gpt2-N, bytes$"
    ):
        load_tokenizer("gpt5")


def test_vocabulary_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GPT2_SHA256", hashlib.sha256(b"").hexdigest())
    with pytest.raises(UserError, match=r"r50k_base\.tiktoken is damaged"):
        module._gpt2_ranks()
