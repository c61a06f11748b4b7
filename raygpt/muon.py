"""Muon for the layers' matrices, AdamW for all else (Jordan et al. 2024).

Muon's update is momentum made orthogonal: its singular values are brought near one by five
Newton-Schulz iterations, so that no direction of a matrix learns much faster than another.
https://kellerjordan.github.io/posts/muon/ has the derivation and the coefficients.

The iterations run in bf16 on a GPU and in fp32 on a CPU, where bf16 is many times slower.  Every
worker makes the same update from the same gradient, so the weights are the same for any W.

What it gives up: sharing the iterations among workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raygpt.products import products, products_and

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
_STACK_ELEMENTS = 2**24
"""Of the matrices that go through the iterations at once; bounds their memory."""


def is_for_muon(name: str) -> bool:
    """Whether a parameter of this name is a matrix of a layer."""
    return ".h." in name and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def muon_groups(
    model: nn.Module, lr_scale: float, momentum: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for :class:`MuonAdamW`: queries, keys and values lie in one matrix, and are three."""
    found: dict[int, list[Tensor]] = {3: [], 1: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_for_muon(name):
            found[3 if name.endswith("c_attn.weight") else 1].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay,
            "lr_scale": lr_scale,
            "muon_momentum": momentum,
            "muon_parts": parts,
        }
        for parts, parameters in found.items()
    ]


@dataclass
class _Matrix:
    """One matrix of a parameter, and what its update is made from; all of one shape are one stack.

    Tall ones are turned on their side, so that they share a stack with the wide ones.
    """

    weight: Tensor
    ahead: Tensor
    group: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = sorted(self.weight.shape)
        return rows, columns

    @property
    def wide(self) -> Tensor:
        rows, columns = self.weight.shape
        return self.ahead if rows <= columns else self.ahead.mT

    def apply(self, wide: Tensor) -> None:
        """Take the step, given the update as :attr:`wide` has it."""
        rows, columns = self.weight.shape
        lr = self.group["lr"]
        self.weight.mul_(1 - lr * self.group["weight_decay"])
        update = wide if rows <= columns else wide.mT
        self.weight.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for the groups that have ``muon_parts``: how many matrices lie in a parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        stacks: dict[tuple[int, int], list[_Matrix]] = {}
        for group in groups:
            if group.get("muon_parts"):
                for matrix in self._matrices(group):
                    stacks.setdefault(matrix.shape, []).append(matrix)
        for (rows, columns), stack in stacks.items():
            most = max(1, _STACK_ELEMENTS // (rows * columns))
            for first in range(0, len(stack), most):
                part = stack[first : first + most]
                updates = orthogonal(torch.stack([matrix.wide for matrix in part]))
                for matrix, update in zip(part, updates, strict=True):
                    matrix.apply(update)
        try:
            self.param_groups = [g for g in groups if not g.get("muon_parts")]
            super().step(closure)
        finally:
            self.param_groups = groups

    def _matrices(self, group: dict[str, Any]) -> Iterator[_Matrix]:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW counts, and looks for it in all it loads
                state["momentum"] = torch.zeros_like(parameter)
            state["step"] += 1
            momentum: Tensor = state["momentum"]
            momentum.lerp_(gradient, 1 - group["muon_momentum"])
            ahead = gradient.lerp(momentum, group["muon_momentum"])  # Nesterov's
            parts = group["muon_parts"]
            for weight, update in zip(parameter.chunk(parts), ahead.chunk(parts), strict=True):
                yield _Matrix(weight, update, group)


def orthogonal(matrices: Tensor) -> Tensor:
    """Wide matrices (n, rows, columns), rows <= columns, with the same singular vectors, and
    singular values near one."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPS)
    for _ in range(_ITERATIONS):
        gram = products(x, x.mT)
        polynomial = products_and(gram, gram, gram, beta=b, alpha=c)
        x = products_and(x, polynomial, x, beta=a)
    return x.to(matrices.dtype)
