"""Products of matrices by either library: the numbers of fp64, and gradients as torch's own."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raygpt import device as devices
from raygpt import products
from raygpt.config import ModelConfig
from raygpt.model import GPT
from raygpt.products import Linear, ProductSum, by_onednn, product

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=320)


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(layer: torch.nn.Linear, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * values(*y.shape, seed=2).to(y.dtype)).sum().backward()
    found = [y, x.grad, *(p.grad for p in layer.parameters())]
    return [tensor.detach() for tensor in found if tensor is not None]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients(shape: tuple[int, ...], bias: bool) -> None:
    ours, exact = Linear(24, 40, bias=bias), torch.nn.Linear(24, 40, bias=bias)
    exact.load_state_dict(ours.state_dict())
    found, expected = (
        with_gradients(layer, values(*shape).to(dtype))
        for layer, dtype in ((ours, torch.float32), (exact.double(), torch.float64))
    )
    assert len(found) == len(expected) == 3 + bias
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("library")
def test_only_what_is_trained_gets_a_gradient() -> None:
    layer = Linear(24, 40)
    layer.weight.requires_grad_(False)
    layer(values(7, 24)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


@pytest.mark.usefixtures("library")
def test_an_output_may_be_changed_in_place() -> None:
    """As the model adds residuals."""
    layer, x = Linear(24, 24), values(2, 3, 24)
    apart = with_gradients(layer, x)
    layer.zero_grad()
    y = layer(x).add_(x)
    (y * values(*y.shape, seed=2)).sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad, apart[2])


class NothingSlow(TorchDispatchMode):
    """oneDNN gets no matrix for which it has no fast code."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            assert args[1].is_contiguous() or args[1].t().is_contiguous()
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)])
def test_bare_products(turned: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of matrices that lie transposed, or are part of a larger one."""
    monkeypatch.setattr(products, "ROWS", 4)
    a, b = values(23, 24)[:, :17], values(17, 9)[:, :8]
    a, b = (m.t().contiguous().t() if t else m for m, t in zip((a, b), turned, strict=True))
    with NothingSlow():
        product(a, b)
    exact = (a.double() @ b.double()).float()
    torch.testing.assert_close(product(a, b), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("columns", [8, 40], ids=["made transposed", "made in parts"])
def test_a_sum_of_products(columns: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of them smaller than the others."""
    monkeypatch.setattr(products, "ROWS", 4)
    total, exact = torch.zeros(23, columns), torch.zeros(23, columns, dtype=torch.float64)
    added = ProductSum(total)
    with NothingSlow():
        for seed, k in enumerate((17, 17, 5)):
            a, b = values(k, 23, seed=seed).t(), values(k, columns, seed=seed + 10)
            exact += a.double() @ b.double()
            added.add(a if turned else a.contiguous(), b)
        added.finish()
    torch.testing.assert_close(total, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
def test_products_of_stacked_matrices() -> None:
    a, b, total = values(3, 5, 7), values(3, 7, 4), values(3, 5, 4)
    exact = a.double() @ b.double()
    torch.testing.assert_close(products.products(a, b), exact.float(), rtol=1e-5, atol=1e-5)
    before = total.clone()
    found = products.products_and(total, a, b, beta=-2, alpha=3)
    torch.testing.assert_close(found, (3 * exact - 2 * total).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, before)


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_a_model_has_the_same_gradients_with_both(
    activation: Literal["gelu", "relu2"], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = torch.arange(3 * 33).view(3, 33) * 7 % 320
    gradients: list[list[Tensor]] = []
    for faster in (False, True):
        monkeypatch.setattr(products, "is_faster", lambda faster=faster: faster)
        torch.manual_seed(1)
        model = GPT(replace(CONFIG, activation=activation))
        model(windows[:, :-1], windows[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for mkl, onednn in zip(*gradients, strict=True):
        torch.testing.assert_close(onednn, mkl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "DEFAULT", False),
    ],
)
def test_the_kind_of_processor_decides(
    vendor: str, capability: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert products.is_faster.__wrapped__() == faster


def test_what_it_is_not_for_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "is_faster", lambda: True)
    layer, x = Linear(8, 8), values(4, 8)
    assert by_onednn(x) and not by_onednn(x.double()) and not by_onednn(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
