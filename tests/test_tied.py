"""One gradient for the two uses of the embedding's matrix."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raygpt.config import ModelConfig
from raygpt.loss import linear_cross_entropy
from raygpt.model import GPT


class Calls(TorchDispatchMode):
    """Names of the operators that are called, also in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_it_is_torchs_own_bit_for_bit() -> None:
    torch.manual_seed(1)
    config = ModelConfig(n_layer=1, n_head=1, n_embd=384, block_size=256, vocab_size=320)
    model = GPT(config)
    weight = model.lm_head.weight
    for words in (320, 5):  # few words come up many times each
        tokens = torch.randint(0, words, (4, config.block_size + 1))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        gradients: list[Tensor] = []
        for tied in (True, False):
            weight.grad = None
            if tied:
                loss = model(inputs, targets)
            else:
                x = model.transformer(inputs).flatten(0, 1)
                loss = linear_cross_entropy(x, weight, targets.flatten(), config.vocab_size)
            loss.backward()
            assert weight.grad is not None
            gradients.append(weight.grad)
        first, second = gradients
        assert torch.equal(first, second)


def test_training_makes_no_second_gradient_of_the_matrix() -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=16))
    tokens = torch.randint(0, 16, (2, 5))
    with Calls() as calls:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    # The positions' is small, and dense.
    assert calls.names.count("aten::embedding_dense_backward") == 1
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad.abs().sum() > 0
