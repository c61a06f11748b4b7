"""AdamW as the GPT-3 paper uses it (Brown et al. 2020, appendix B), and the learning rate.

The rate is a pure function of the tokens seen, so a resumed or ramped run has no schedule to
restore.  Matrices may have Muon instead, see ``muon.py``.  What it gives up: other optimizers and
other schedules.
"""

import math
from typing import Any

import torch
from torch import nn

from raygpt.config import OptimConfig
from raygpt.muon import MuonAdamW, muon_groups


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay; biases and LayerNorms (1-D) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over :func:`param_groups`; its rate is set before each step with :func:`set_lr`.

    With ``optim.matrices`` muon, the layers' matrices are in groups of their own.

    Args:
        fused: one kernel for the whole update, which torch has for CPUs and NVIDIA GPUs.
    """
    groups = param_groups(model, config.weight_decay)
    kind = torch.optim.AdamW
    if config.matrices == "muon":
        kind, scale = MuonAdamW, config.muon_lr / config.max_lr
        muon = muon_groups(model, scale, config.muon_momentum, config.weight_decay)
        taken = {id(p) for group in muon for p in group["params"]}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        groups += muon
    return kind(
        groups,
        lr=config.max_lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused or None,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, Muon's in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def lr_at(
    tokens_before: int,
    step_tokens: int,
    *,
    max_lr: float,
    min_lr: float,
    warmup_tokens: int,
    decay_tokens: int,
) -> float:
    """Learning rate of a step: linear warm-up, cosine decay, then ``min_lr`` for good.

    While ``tokens_before < warmup_tokens`` the rate is that of the step's last token,
    ``max_lr * (tokens_before + step_tokens) / warmup_tokens`` and at most ``max_lr``; with a
    constant batch this is ``max_lr * (step + 1) / warmup_steps``.  Half a cosine follows from
    ``warmup_tokens`` to ``decay_tokens`` (Brown et al. 2020, appendix B).  If the decay would
    end before the warm-up does, there is none: ``min_lr`` follows the warm-up.

    Args:
        tokens_before: targets seen before the step.
        step_tokens: targets of the step.
        warmup_tokens: length of the warm-up; 0 for none.
        decay_tokens: targets, counted from the run's start, after which the rate is ``min_lr``.
    """
    if tokens_before < warmup_tokens:
        return max_lr * min(1.0, (tokens_before + step_tokens) / warmup_tokens)
    if tokens_before >= decay_tokens:
        return min_lr
    progress = (tokens_before - warmup_tokens) / (decay_tokens - warmup_tokens)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (max_lr - min_lr)
