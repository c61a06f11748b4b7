"""The named runs: the embedded text, GPT-2's sizes, GPT-3's sizes.

``shakespeare`` trains on two CPU cores in minutes.  The others set everything but the corpus
(``data.corpus`` is empty and must be given) and the hardware (``scale``).  What they give up:
being tuned; they follow the papers.

Beside the embedded text's run and GPT-2's there is each time one with ``-modern`` in its name: the
same sizes and data with what has come since GPT-2, see ``model.py`` and ``muon.py``.
"""

from bisect import bisect_left
from dataclasses import replace

from raygpt.config import (
    EMBEDDED_CORPUS,
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScaleConfig,
    TrainConfig,
)
from raygpt.data.order import BatchSchedule
from raygpt.errors import UserError
from raygpt.values import nearest

WARMUP_TOKENS = 375_000_000
"""Brown et al. 2020, appendix B."""
GPT2_TOKENS = 10_000_000_000
GPT3_DECAY_TOKENS = 260_000_000_000
GPT3_TOKENS = 300_000_000_000
GPT3_RAMP_START = 32_768
GPT3_LANES = 16
"""The most that 32,768 tokens hold at a context of 2,048."""


def _shakespeare() -> Config:
    """Tuned for the loss that two CPU cores reach in about two minutes.

    What differs from GPT-3's recipe is what so small a model in so few steps gains from: a high
    rate that falls to zero, more weight decay, a longer memory of squared gradients, and the first
    1,024 of GPT-2's tokens, since bytes are so short that a window of them holds little.
    """
    return Config(
        run=RunConfig(name="shakespeare"),
        data=DataConfig(corpus=EMBEDDED_CORPUS),
        model=ModelConfig(n_layer=3, n_head=4, n_embd=128, block_size=64, vocab_size=1024),
        batch=BatchConfig(tokens=1536, lanes=2, micro=12),
        optim=OptimConfig(
            max_lr=1.2e-2, min_lr=0.0, warmup_steps=100, weight_decay=0.3, betas=(0.9, 0.99)
        ),
        train=TrainConfig(
            steps=1240, log_every=20, eval_every=620, checkpoint_every=620, precision="fp32"
        ),
        scale=ScaleConfig(workers="2", gpus_per_worker=0),  # for a GPU it is far too small
    )


def _shakespeare_modern() -> Config:
    """Tuned like ``shakespeare``: what two cores reach in the same minutes."""
    config = _modern(_shakespeare())
    return replace(
        config,
        model=replace(config.model, block_size=128),
        batch=replace(config.batch, tokens=2048, micro=8),
        optim=replace(
            config.optim,
            max_lr=1e-2,
            warmup_steps=50,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            muon_lr=0.03,
        ),
        train=replace(config.train, steps=700, eval_every=350, checkpoint_every=350),
    )


def _gpt2(name: str, n_layer: int, n_head: int, n_embd: int, max_lr: float, micro: int) -> Config:
    """Radford et al. 2019, table 2, with the batch and schedule of GPT-3's smallest models.

    A step is 32 lanes of 16 windows: the 32 micro-batches of 16 x 1,024 tokens that one device
    accumulates, and work for up to 32.
    """
    tokens = 524_288
    return Config(
        run=RunConfig(name=name),
        data=DataConfig(corpus=""),
        model=ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd),
        batch=BatchConfig(tokens=tokens, lanes=32, micro=micro),
        optim=OptimConfig(max_lr=max_lr, warmup_steps=round(WARMUP_TOKENS / tokens)),
        train=TrainConfig(steps=GPT2_TOKENS // tokens),
    )


def _gpt3(
    name: str,
    n_layer: int,
    n_embd: int,
    n_head: int,
    tokens: int,
    max_lr: float,
    ramp_tokens: int,
    micro: int,
) -> Config:
    """Brown et al. 2020, table 2.1 and appendix B.

    The ramp ends after 4 to 12 billion tokens "depending on the model size"; the paper does not
    say which size gets what, so here it grows with the batch.  ``train.steps`` counts the ramp's
    small steps, too: it is the first number of steps with 300 billion tokens.
    """
    block_size = 2048
    unit = GPT3_LANES * block_size
    schedule = BatchSchedule(
        GPT3_LANES, block_size, tokens // unit, GPT3_RAMP_START // unit, ramp_tokens
    )
    most = 2 * GPT3_TOKENS // tokens
    return Config(
        run=RunConfig(name=name),
        data=DataConfig(corpus=""),
        model=ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size),
        batch=BatchConfig(
            tokens=tokens,
            lanes=GPT3_LANES,
            micro=micro,
            ramp_start_tokens=GPT3_RAMP_START,
            ramp_tokens=ramp_tokens,
        ),
        optim=OptimConfig(
            max_lr=max_lr,
            warmup_steps=round(WARMUP_TOKENS / tokens),
            decay_tokens=GPT3_DECAY_TOKENS,
        ),
        train=TrainConfig(
            steps=bisect_left(range(most), GPT3_TOKENS, key=schedule.tokens_before),
        ),
    )


def _modern(config: Config) -> Config:
    """The same run with rotary positions, RMSNorm, normalised queries and keys, squared ReLU, no
    biases, and Muon for the matrices, at its authors' rate."""
    return replace(
        config,
        run=replace(config.run, name=f"{config.run.name}-modern"),
        model=replace(
            config.model,
            positions="rotary",
            norm="rms",
            qk_norm=True,
            activation="relu2",
            bias=False,
        ),
        optim=replace(config.optim, matrices="muon"),
    )


_GPT2 = (
    #     name         layers heads embd   max_lr  micro; beyond 124M the rates of GPT-3's sizes
    _gpt2("gpt2", 12, 12, 768, 6e-4, 16),
    _gpt2("gpt2-medium", 24, 16, 1024, 3e-4, 8),
    _gpt2("gpt2-large", 36, 20, 1280, 2.5e-4, 4),
    _gpt2("gpt2-xl", 48, 25, 1600, 2e-4, 4),
)
_GPT3 = (
    # The paper's batches of 0.5M, 1M, 2M and 3.2M tokens are taken as 2**19, 2**20, 2**21 and
    # 3 * 2**20, which divide into lanes and windows.
    #     name       layers  embd heads      batch   max_lr             ramp  micro
    _gpt3("gpt3-125m", 12, 768, 12, 524_288, 6e-4, 4_000_000_000, 8),
    _gpt3("gpt3-350m", 24, 1024, 16, 524_288, 3e-4, 4_000_000_000, 4),
    _gpt3("gpt3-760m", 24, 1536, 16, 524_288, 2.5e-4, 4_000_000_000, 2),
    # The table gives 24 heads of 128, which are 3,072, not 2,048; here 16 heads of 128.
    _gpt3("gpt3-1.3b", 24, 2048, 16, 1_048_576, 2e-4, 6_000_000_000, 2),
    _gpt3("gpt3-2.7b", 32, 2560, 32, 1_048_576, 1.6e-4, 6_000_000_000, 1),
    _gpt3("gpt3-6.7b", 32, 4096, 32, 2_097_152, 1.2e-4, 8_000_000_000, 1),
    # The table gives an n_embd of 5,140, which 40 heads of 128 do not make; here 5,120.
    _gpt3("gpt3-13b", 40, 5120, 40, 2_097_152, 1e-4, 8_000_000_000, 1),
    _gpt3("gpt3-175b", 96, 12_288, 96, 3_145_728, 0.6e-4, 12_000_000_000, 1),
)

_RUNS = (
    _shakespeare(),
    _shakespeare_modern(),
    *_GPT2,
    *(_modern(config) for config in _GPT2),
    *_GPT3,
)
PRESETS: dict[str, Config] = {config.run.name: config for config in _RUNS}


def preset(name: str) -> Config:
    """The run called ``name``.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in PRESETS:
        near = nearest(name, list(PRESETS))
        raise UserError(
            f"unknown preset {name!r}; did you mean {near!r}? Known are {', '.join(PRESETS)}"
        )
    return PRESETS[name]
