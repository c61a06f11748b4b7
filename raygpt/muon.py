"""Muon for the layers' matrices, AdamW for all else (Jordan et al. 2024).

Muon's update is momentum made orthogonal: its singular values are brought near one by five
Newton-Schulz iterations, so that no direction of a matrix learns much faster than another.
https://kellerjordan.github.io/posts/muon/ has the derivation and the coefficients.

The iterations run in bf16 on a GPU and in fp32 on a CPU, where bf16 is many times slower.  Every
worker makes the same update from the same gradient, so the weights are the same for any W.

What it gives up: sharing the iterations among workers.
"""

from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7


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


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for the groups that have ``muon_parts``: how many matrices lie in a parameter."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon_parts"):
                for parameter in group["params"]:
                    self._update(parameter, group)
        try:
            self.param_groups = [g for g in groups if not g.get("muon_parts")]
            super().step(closure)
        finally:
            self.param_groups = groups

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW counts, and looks for it in all that it loads
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 1 - group["muon_momentum"])
        ahead = gradient.lerp(momentum, group["muon_momentum"])  # Nesterov's
        rows, columns = parameter.shape
        parts = ahead.view(group["muon_parts"], rows // group["muon_parts"], columns)
        update = orthogonal(parts)
        scale = max(1.0, parts.shape[1] / columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(rows, columns), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with the same singular vectors, and singular values near one."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + _EPS)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)
