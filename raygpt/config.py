"""Every setting of a run: frozen dataclasses, checked once, when built.

A setting is named ``section.field`` everywhere: on the command line
(``--batch.tokens 524288``), in a YAML file, in ``config.json`` and in error
messages.  Each section checks itself in ``__post_init__``; what concerns two
sections is checked by :class:`Config`.  Nothing here knows torch or Ray.

Units: lengths and batches are in tokens, the schedule in optimizer steps.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from raygpt.errors import UserError

Precision = Literal["auto", "fp32", "bf16"]
EMBEDDED_CORPUS = "embedded"
READER_CPUS = 0.1
"""CPU share of a read task, out of a worker's."""


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{section}.{name} must be above 0, got {value}")


def _not_negative(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise UserError(f"{section}.{name} must not be negative, got {value}")


@dataclass(frozen=True)
class RunConfig:
    name: str = "shakespeare"
    """Name of the run, and of its folder below run.storage."""
    storage: str = "runs"
    """Folder or URI (s3://, gs://) that holds runs; every node must reach it."""
    storage_patience: float = 300.0
    """Seconds for which a storage that refuses is tried again, before the run stops."""
    mlflow: str | None = None
    """MLflow's tracking URI, such as http://host:5000 or sqlite:////path/mlflow.db."""
    wandb: str | None = None
    """Project of Weights & Biases."""

    def __post_init__(self) -> None:
        if "@" in (self.mlflow or "").partition("://")[2].partition("/")[0]:
            raise UserError(
                "run.mlflow has a user in it; give MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to the driver instead"
            )
        if not self.name or "/" in self.name or "\\" in self.name or self.name.startswith("."):
            raise UserError(
                f"run.name must be a plain folder name, got {self.name!r}; "
                "the place goes into run.storage"
            )
        if not self.storage:
            raise UserError("run.storage is empty; give a folder or a URI such as s3://bucket/runs")
        _not_negative("run", storage_patience=self.storage_patience)


@dataclass(frozen=True)
class DataConfig:
    corpus: str = EMBEDDED_CORPUS
    """Folder or URI of a corpus made by jobs/prepare.py; 'embedded' is the text in the package, in
    as many of GPT-2's first tokens as model.vocab_size holds, up to 320 in bytes."""
    val_corpus: str | None = None
    """Corpus whose validation split is used instead of data.corpus's own."""
    seed: int = 1337
    """Key of the data order (chunks and windows)."""
    segment_steps: int | None = None
    """Steps read by one Ray Data task; by default about a million tokens, at most 512 steps."""

    def __post_init__(self) -> None:
        if self.segment_steps is not None:
            _positive("data", segment_steps=self.segment_steps)


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 1024
    """T, the tokens of context."""
    vocab_size: int = 50_304
    """Rows of the embedding: the tokenizer's vocabulary, padded for speed."""
    dropout: float = 0.0
    positions: Literal["learned", "rotary"] = "learned"
    """learned: a vector for each position, as GPT-2; rotary: queries and keys are turned."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm, as GPT-2, or RMSNorm, which does not centre."""
    qk_norm: bool = False
    """Normalise queries and keys before they meet."""
    activation: Literal["gelu", "relu2"] = "gelu"
    """Of the MLP: GELU, as GPT-2, or the square of ReLU."""
    bias: bool = True
    """Linear layers and LayerNorms have biases, as GPT-2's."""

    def __post_init__(self) -> None:
        _positive(
            "model", n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd,
            block_size=self.block_size, vocab_size=self.vocab_size,
        )  # fmt: skip
        if self.n_embd % self.n_head:
            raise UserError(
                f"model.n_embd {self.n_embd} is not divisible by model.n_head {self.n_head}"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise UserError(
                f"model.n_embd / model.n_head is {self.head_size}; rotary positions turn pairs, so "
                "it must be even"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must lie in [0, 1), got {self.dropout}")

    @property
    def head_size(self) -> int:
        """Width of a head's queries, keys and values."""
        return self.n_embd // self.n_head

    @property
    def is_gpt2(self) -> bool:
        """Whether the network is GPT-2's in all but size."""
        gpt2 = ModelConfig()
        names = ("positions", "norm", "qk_norm", "activation", "bias")
        return all(getattr(self, name) == getattr(gpt2, name) for name in names)


@dataclass(frozen=True)
class BatchConfig:
    tokens: int = 524_288
    """Tokens of one optimizer step, over all lanes."""
    lanes: int = 8
    """L: fixed streams of windows a batch is made of; at most L workers. A power of two."""
    micro: int = 16
    """Windows of one lane that go through the model at once."""
    ramp_start_tokens: int = 0
    """Batch size at step 0 of the GPT-3 ramp; 0 means no ramp."""
    ramp_tokens: int = 0
    """Tokens over which the batch grows linearly to batch.tokens."""

    def __post_init__(self) -> None:
        _positive("batch", tokens=self.tokens, lanes=self.lanes, micro=self.micro)
        _not_negative(
            "batch", ramp_start_tokens=self.ramp_start_tokens, ramp_tokens=self.ramp_tokens
        )
        if self.lanes & (self.lanes - 1):
            raise UserError(f"batch.lanes must be a power of two, got {self.lanes}")
        if bool(self.ramp_start_tokens) != bool(self.ramp_tokens):
            raise UserError(
                "batch.ramp_start_tokens and batch.ramp_tokens go together; "
                f"got {self.ramp_start_tokens} and {self.ramp_tokens}"
            )
        if self.ramp_start_tokens > self.tokens:
            raise UserError(
                f"batch.ramp_start_tokens {self.ramp_start_tokens} is larger than "
                f"batch.tokens {self.tokens}"
            )


@dataclass(frozen=True)
class OptimConfig:
    max_lr: float = 6e-4
    min_lr: float | None = None
    """Rate after the decay; by default a tenth of optim.max_lr."""
    warmup_steps: int = 100
    """Length of the linear warm-up, in steps of the full batch."""
    decay_tokens: int | None = None
    """Tokens after which the cosine has reached optim.min_lr; by default all tokens of the run."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the layers' matrices; all else has AdamW."""
    muon_lr: float = 0.02
    """Rate of Muon where that of AdamW is optim.max_lr; they follow the same schedule."""
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        _positive("optim", max_lr=self.max_lr, eps=self.eps, muon_lr=self.muon_lr)
        if not 0 <= self.muon_momentum < 1:
            raise UserError(f"optim.muon_momentum must lie in [0, 1), got {self.muon_momentum}")
        _not_negative(
            "optim", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay,
            grad_clip=self.grad_clip, min_lr=self.min_lr or 0.0,
        )  # fmt: skip
        if self.min_lr is not None and self.min_lr > self.max_lr:
            raise UserError(f"optim.min_lr {self.min_lr} is above optim.max_lr {self.max_lr}")
        if self.decay_tokens is not None:
            _positive("optim", decay_tokens=self.decay_tokens)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas must lie in [0, 1), got {self.betas}")


def profiled_steps(text: str) -> range:
    """The steps that ``train.profile`` names. Raises UserError."""
    first, _, end = text.partition(":")
    if not text:
        return range(0)
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise UserError(f"train.profile must be N:M, whole numbers with N < M, got {text!r}")
    return range(int(first), int(end))


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    """Optimizer steps of the run."""
    seed: int = 1337
    """Key of the initial weights and of dropout."""
    exact: bool | None = None
    """Deterministic kernels on a GPU; on a CPU they are always on. Default: on for CPU only."""
    precision: Precision = "auto"
    """auto: bf16 autocast where the hardware has it, else fp32."""
    compile: bool = False
    """torch.compile the layers of the model.  Not for fp32 on AMD's CPUs with AVX-512: they
    multiply faster without it."""
    activation_checkpointing: bool = False
    """Keep only what goes into each layer, and compute the rest again for the gradient: less
    memory, more time, the same numbers."""
    log_every: int = 1
    eval_every: int = 250
    """Steps between validations; 0 validates at the end only."""
    eval_tokens: int = 1_048_576
    """Tokens of the fixed validation set; the split is cut to it. 0: no validation."""
    checkpoint_every: int = 250
    """Steps between checkpoints; one is always written at the end."""
    sample_prompt: str = "\n"
    """Prompt of the sample printed at the end; empty prints none."""
    sample_tokens: int = 200
    straggler_factor: float = 1.5
    """A worker that takes so many times as long as the others is named; 0 for none."""
    profile: str = ""
    """N:M profiles the steps from N to M - 1, into the run's folder."""

    def __post_init__(self) -> None:
        _positive(
            "train", steps=self.steps, log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
        )  # fmt: skip
        _not_negative(
            "train",
            eval_every=self.eval_every,
            sample_tokens=self.sample_tokens,
            eval_tokens=self.eval_tokens,
            straggler_factor=self.straggler_factor,
        )
        if profiled_steps(self.profile).stop > self.steps:
            raise UserError(f"train.profile {self.profile}: the run ends at step {self.steps}")


@dataclass(frozen=True)
class ScaleConfig:
    workers: str = "1"
    """Ray Train workers: N, or MIN:MAX for an elastic run."""
    gpus_per_worker: int | None = None
    """GPUs of a worker: 0 or 1; by default 1 where the cluster has GPUs."""
    cpus_per_worker: float = 1.0
    threads: int = 1
    """CPU threads of a worker; part of the run's numbers, since it changes the order of sums."""

    def __post_init__(self) -> None:
        if self.gpus_per_worker not in (None, 0, 1):
            raise UserError(f"scale.gpus_per_worker must be 0 or 1, got {self.gpus_per_worker}")
        _positive("scale", cpus_per_worker=self.cpus_per_worker, threads=self.threads)
        if self.cpus_per_worker <= READER_CPUS:
            raise UserError(
                f"scale.cpus_per_worker {self.cpus_per_worker:g} must be above {READER_CPUS}, the "
                "share that reading takes"
            )
        parts = self.workers.split(":")
        if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise UserError(f"scale.workers must be N or MIN:MAX, got {self.workers!r}")
        if self.min_workers > self.max_workers:
            raise UserError(f"scale.workers {self.workers}: MIN is larger than MAX")

    @property
    def min_workers(self) -> int:
        return int(self.workers.split(":")[0])

    @property
    def max_workers(self) -> int:
        return int(self.workers.split(":")[-1])


@dataclass(frozen=True)
class Config:
    """All settings of one run.

    Raises:
        UserError: a value is out of range, or two settings do not fit together.
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        unit = self.batch.lanes * self.model.block_size
        for name in ("tokens", "ramp_start_tokens"):
            value = getattr(self.batch, name)
            if value % unit:
                near = max(1, round(value / unit)) * unit
                raise UserError(
                    f"batch.{name} {value} is not divisible by batch.lanes x model.block_size = "
                    f"{self.batch.lanes} x {self.model.block_size} = {unit}; {near} would be"
                )
        if self.scale.max_workers > self.batch.lanes:
            raise UserError(
                f"scale.workers {self.scale.workers} is more than batch.lanes "
                f"{self.batch.lanes}: a lane cannot be shared; use fewer workers or more lanes"
            )

    @property
    def windows_per_lane(self) -> int:
        """g: windows that one lane gives to a step of the full batch."""
        return self.batch.tokens // (self.batch.lanes * self.model.block_size)

    @property
    def min_lr(self) -> float:
        return self.optim.max_lr / 10 if self.optim.min_lr is None else self.optim.min_lr

    @property
    def segment_steps(self) -> int:
        """Steps that one block of the stream holds: about a million tokens of a lane.

        Not more than 512 steps, so that tiny models stream, too; more tokens in very long
        runs, whose blocks Ray Data would otherwise be slow to list (65,536 at most).
        """
        lane_tokens = self.windows_per_lane * self.model.block_size
        usual = min(512, math.ceil(2**20 / lane_tokens))
        return self.data.segment_steps or max(
            usual, math.ceil(self.train.steps * self.batch.lanes / 65_536)
        )
