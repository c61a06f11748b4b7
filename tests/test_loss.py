"""Head and cross entropy in one: the numbers of torch's own, in any number of chunks."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raygpt import loss as loss_module
from raygpt.loss import _chunk_rows, linear_cross_entropy
from raygpt.products import product

N, C, V, N_VOCAB = 37, 16, 50, 47

pytestmark = pytest.mark.usefixtures("library")


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(N, C, generator=random).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, C, generator=random)).to(dtype).requires_grad_()
    return x, weight, torch.randint(N_VOCAB, (N,), generator=random)


def expected(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight[:N_VOCAB]).float(), targets)


@pytest.fixture(params=[1, 7, 36, 37, 1000])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens of a chunk, at most."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * V * request.param)
    return int(request.param)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["usual", "far apart"])
def test_loss_and_gradients_are_those_of_torch(rows: int, scale: float) -> None:
    """Also where probabilities of targets are below the smallest number of fp32."""
    results: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for function in (linear_cross_entropy, expected):
        x, weight, targets = inputs(scale=scale)
        arguments = (N_VOCAB,) if function is linear_cross_entropy else ()
        loss = function(x, weight, targets, *arguments)
        (3 * loss).backward()
        results.append((loss, x.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6 * scale, rtol=2e-6)
    grad = results[0][2]
    assert grad is not None and (grad[N_VOCAB:] == 0).all(), "of padding, to the last bit"


def test_without_gradients_the_loss_is_the_same(rows: int) -> None:
    x, weight, targets = inputs()
    with torch.no_grad():
        quiet = linear_cross_entropy(x, weight, targets, N_VOCAB)
    assert not quiet.requires_grad
    assert torch.equal(quiet, linear_cross_entropy(x, weight, targets, N_VOCAB))


def test_only_what_is_trained_gets_a_gradient() -> None:
    x, weight, targets = inputs()
    linear_cross_entropy(x.detach(), weight, targets, N_VOCAB).backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize("kind", ["autocast", "all bf16"])
def test_bf16_products_and_an_fp32_loss(rows: int, kind: str) -> None:
    x, weight, targets = inputs(torch.bfloat16 if kind == "all bf16" else torch.float32)
    exact = expected(x.float(), weight.float(), targets)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = linear_cross_entropy(x, weight, targets, N_VOCAB)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-2)
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == x.dtype and weight.grad.dtype == weight.dtype
    want_x, want_weight = torch.autograd.grad(exact, (x, weight))
    torch.testing.assert_close(x.grad, want_x, atol=1e-3, rtol=5e-2)
    torch.testing.assert_close(weight.grad, want_weight, atol=2e-3, rtol=5e-2)


def test_no_matrix_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward: the largest piece of memory is a chunk."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * V * 5)
    x, weight, targets = inputs()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(x, weight, targets, N_VOCAB).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * max(V * 5, V * C, N * C)
    assert largest < 4 * N * V


def test_there_is_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * V * 5)
    chunks: list[weakref.ref[Tensor]] = []

    def kept(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        is_chunk = b.shape[1] == V
        assert not is_chunk or not any(chunk() is not None for chunk in chunks)
        result = product(a, b, out)
        if is_chunk:
            chunks.append(weakref.ref(result))
        return result

    monkeypatch.setattr(loss_module, "product", kept)
    linear_cross_entropy(*inputs(), N_VOCAB).backward()
    assert len(chunks) == 8


def test_a_second_backward_pass_is_refused() -> None:
    """Its gradients were scaled in place."""
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets, N_VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(Exception, match="gradients"):
        loss.backward()


@pytest.mark.parametrize(
    ("tokens", "least", "rows"), [(1024, 1, 1024), (1024, 7, 128), (37, 5, 8), (12, 12, 1)]
)
def test_chunks_are_of_one_size_where_that_costs_little(tokens: int, least: int, rows: int) -> None:
    assert _chunk_rows(tokens, 100, math.ceil(100 * tokens / least)) == rows
