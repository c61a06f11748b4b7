"""GPT-2 (Radford et al. 2019, section 2.3), with the parameter names of its release.

Pre-LayerNorm blocks, learned positions, tanh-GELU, and one matrix for the token embedding and
the output head.  Shapes: B sequences, T tokens, C = n_embd, H = n_head, V = vocab_size.

By settings, what has come since: rotary positions (Su et al. 2021, section 3.2.2, with the pairs
half a head apart), RMSNorm (Zhang & Sennrich 2019, eq. 4), queries and keys normalised (Henry et
al. 2020, here with RMSNorm without weights), squared ReLU (So et al. 2021), no biases.

The vocabulary may be padded for speed.  The padded logits are -inf: they are never sampled, the
loss is that of the unpadded model, and the padded rows of the head get a gradient of exactly zero.

What it gives up: a cache of keys and values.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raygpt import recompute
from raygpt.attention import causal_attention
from raygpt.config import ModelConfig
from raygpt.gelu import gelu, gelu_again
from raygpt.loss import linear_cross_entropy
from raygpt.products import Linear
from raygpt.recompute import Again
from raygpt.tied import two_uses

NORM_EPS = 1e-5
INIT_STD = 0.02
ROTARY_BASE = 10_000.0
"""Su et al. 2021, section 3.2.2."""
MOST_SHAPES = 1024
"""Of tokens, for which layers are compiled: of the micro-batches of a ramp, and of their rests."""


class Rotary(nn.Module):
    """Turns pairs of (B, H, T, D) by angles that grow with the position, at D / 2 speeds."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        half = config.head_size // 2
        speeds = ROTARY_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), speeds)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[-2]
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def build_norm(config: ModelConfig) -> nn.LayerNorm | nn.RMSNorm:
    """The norm before a branch, over the last dimension."""
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=NORM_EPS)
    return nn.LayerNorm(config.n_embd, eps=NORM_EPS, bias=config.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) to (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        self.rotary = Rotary(config) if config.positions == "rotary" else None
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """``again`` makes ``x`` again, if it shall not be kept for the backward pass."""
        B, T, C = x.shape
        # Not a view of five dimensions, whose gradient is copied twice.
        parts = recompute.linear(self.c_attn, x, again).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in parts)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        if self.qk_norm:
            q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(q, k, v, dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers, 4C wide between them; (B, T, C) to (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.squared = config.activation == "relu2"
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """``again`` makes ``x`` again, if it shall not be kept for the backward pass."""
        x = recompute.linear(self.c_fc, x, again)
        if self.squared:
            x = F.relu(x)
            y = x * x  # not square(), whose gradient goes through a power and is many times slower
            y_again: Again = partial(torch.mul, x.detach(), x.detach())
        elif again is None:
            return self.c_proj(gelu(x))
        else:
            y, y_again = gelu_again(x)
        return recompute.linear(self.c_proj, y, again and y_again)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = Attention(config)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)
        self.recomputes = True

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in ((self.ln_1, self.attn), (self.ln_2, self.mlp)):
            again = partial(norm, x.detach()) if self.recomputes and recompute.pays(x) else None
            y = self.drop(branch(norm(x), again))
            # In place where the branch is not of autocast's narrower type.
            x = y.add_(x) if y.dtype == x.dtype else x + y
        return x


class Transformer(nn.Module):
    """Embeddings, the layers and the last norm: all but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe: nn.Embedding | None = None
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = build_norm(config)
        self.checkpoint_activations = False

    def forward(self, idx: Tensor, table: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of tokens (B, T) int64.

        Args:
            table: takes the place of the token embedding (V, C), and gets a sparse gradient.

        Raises:
            ValueError: T is above ``block_size``.
        """
        T = idx.shape[1]
        if T > self.block_size:
            raise ValueError(f"{T} tokens are more than model.block_size {self.block_size}")
        x = self.wte(idx) if table is None else F.embedding(idx, table, sparse=True)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(T, device=idx.device))
        x = self.drop(x)
        for block in self.h:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    """The network.

    The initial weights are a function of torch's default generator: call
    ``torch.manual_seed`` first, or :meth:`init_weights` with a generator afterwards.

    Args:
        config: its sizes.
        n_vocab: tokens in use; ids from there to ``config.vocab_size`` are padding.
            By default there is none.

    Raises:
        ValueError: ``n_vocab`` is larger than ``config.vocab_size``.
    """

    def __init__(self, config: ModelConfig, n_vocab: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.n_vocab = config.vocab_size if n_vocab is None else n_vocab
        if not 0 < self.n_vocab <= config.vocab_size:
            raise ValueError(
                f"n_vocab {self.n_vocab} must lie in 1..model.vocab_size {config.vocab_size}"
            )
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as GPT-2 does; in place, from ``generator`` or torch's default.

        Normal with standard deviation 0.02, biases zero.  The projections that end a residual
        branch are scaled by 1/sqrt(number of branches) (Radford et al. 2019, section 2.3).
        """
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                parameter.normal_(0.0, std, generator=generator)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of the transformer's hidden states (..., C); padded ones are -inf."""
        logits: Tensor = self.lm_head(x)
        logits[..., self.n_vocab :] = -math.inf
        return logits

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with ``targets`` the loss.

        Args:
            idx: tokens, (B, T) int64.
            targets: the token after each of ``idx``, (B, T) int64.

        Returns:
            Logits (B, T, V), or the mean cross entropy in nats a token, an fp32 scalar.

        Raises:
            ValueError: T is above ``config.block_size``.
        """
        if targets is None:
            return self.head(self.transformer(idx))
        table, head = two_uses(self.lm_head.weight)
        x = self.transformer(idx, table)
        return linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), self.n_vocab)

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward pass, which computes the rest again, to
        the same bits (Chen et al. 2016, section 4)."""
        self.transformer.checkpoint_activations = True
        for module in self.modules():
            if isinstance(module, Block):
                module.recomputes = False  # else it would keep what it makes these from

    def compile_layers(self, **options: Any) -> None:
        """Compile the layers with torch.compile, in place; they share what is compiled.

        Each shape of tokens for itself: what torch would compile for all of them depends on which
        came first, and after eight shapes it would compile no more, so a restart could change bits.
        """
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = (
            MOST_SHAPES
        )
        for block in self.transformer.h:
            block.compile(dynamic=False, **options)

    def num_params(self) -> int:
        """Parameters, tied weights counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
