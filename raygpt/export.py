"""Write a model as a folder that ``transformers`` loads offline.

``AutoModelForCausalLM`` finds a GPT2LMHeadModel with the vocabulary's padding cut off, and
``AutoTokenizer`` a tokenizer with the same ids.  transformers itself is not needed.

What it gives up: sharded weight files (one file, built in memory), and one rule of ours: the
string ``<|endoftext|>`` inside a text is a special token there, ordinary text here.
"""

import json
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from raygpt.config import ModelConfig
from raygpt.data.tokenizer import END_OF_TEXT, Tokenizer
from raygpt.errors import UserError
from raygpt.model import GPT, INIT_STD, NORM_EPS
from raygpt.storage import Folder

Json = dict[str, Any]
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Stored (in, out) in transformers, (out, in) in nn.Linear."""


def export(model: GPT, config: ModelConfig, tokenizer: Tokenizer, output: str) -> list[str]:
    """Write weights, settings and tokenizer to ``output``; returns the names of the files.

    Raises:
        UserError: the model is no GPT-2, the tokenizer is not the model's, or ``output`` is not
            empty or cannot be written.
    """
    if not config.is_gpt2:
        raise UserError(
            "the model is not GPT-2's in model.positions, model.norm, model.qk_norm, "
            "model.activation or model.bias; transformers has no class of its kind"
        )
    if tokenizer.n_vocab != model.n_vocab:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.n_vocab} tokens, the model "
            f"{model.n_vocab}; export with the tokenizer of the training corpus"
        )
    folder = Folder.from_path(output)
    if folder.is_file() or folder.list():
        raise UserError(f"{folder} is not an empty folder; give another --output or delete it")
    files = {"model.safetensors": safetensors.torch.save(weights(model), {"format": "pt"})}
    documents = {
        "generation_config.json": {
            "bos_token_id": tokenizer.eot,
            "eos_token_id": tokenizer.eot,
            "pad_token_id": tokenizer.eot,
        },
        **_tokenizer_files(tokenizer, config),
    }
    files |= {name: _json(value) for name, value in documents.items()}
    files["merges.txt"] = "\n".join(["#version: 0.2", *_merges(tokenizer), ""]).encode()
    files["config.json"] = _json(_config(config, tokenizer))  # last: without it nothing loads
    for name, data in files.items():
        folder.write_bytes(name, data)
    return sorted(files)


def weights(model: GPT) -> dict[str, Tensor]:
    """The model's weights by the names and shapes of GPT2LMHeadModel, fp32, on the CPU."""
    result = {}
    for name, parameter in model.named_parameters():  # tied weights once, as transformer.wte
        tensor = parameter.detach().to("cpu", torch.float32)
        if name == "transformer.wte.weight":
            tensor = tensor[: model.n_vocab]
        result[name] = tensor.T.contiguous() if name.endswith(_CONV1D) else tensor.contiguous()
    return result


def _config(config: ModelConfig, tokenizer: Tokenizer) -> Json:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": tokenizer.n_vocab,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": NORM_EPS,
        "initializer_range": INIT_STD,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "torch_dtype": "float32",
    }


def _tokenizer_files(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Json]:
    """tokenizer.json of the ``tokenizers`` library, its settings, and GPT-2's vocab.json."""
    vocab = {_printable(token): i for i, token in enumerate(tokenizer.tokens())}
    vocab[END_OF_TEXT] = tokenizer.eot
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {
        "id": tokenizer.eot,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special],
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "use_regex": True},  # GPT-2's pattern
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": vocab,
                "merges": _merges(tokenizer),
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.block_size,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
        },
        "vocab.json": vocab,
    }


def _merges(tokenizer: Tokenizer) -> list[str]:
    """The merges that made the vocabulary, in order, each as two printable tokens.

    Ranks tell which tokens there are, not what each was merged from.  But the merge that made
    a token is the last one when its own bytes are encoded with the tokens of lower rank, so
    encoding stops at the two parts.
    """
    tokens = tokenizer.tokens()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [
        " ".join(_printable(part) for part in _two_parts(token, ranks))
        for token in tokens
        if len(token) > 1
    ]


def _two_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[best : best + 2] = [pairs[best]]
    return parts


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte, none of which is white space.

    Printable Latin-1 characters stand for themselves; the other 68 bytes get U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, others = [], 0
    for byte in range(256):
        characters.append(chr(byte) if byte in printable else chr(256 + others))
        others += byte not in printable
    return characters


_CHARACTERS = _byte_characters()


def _printable(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)


def _json(value: Json) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
