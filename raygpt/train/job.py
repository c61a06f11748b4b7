"""A run, resolved: its settings, its corpus and every number that follows from them.

A :class:`Job` is plain values: the driver makes it, every worker gets it.  All that can be
wrong with settings and corpus is found here, before Ray is asked for anything.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from raygpt.config import EMBEDDED_CORPUS, Config
from raygpt.data.corpus import MANIFEST, Corpus, open_corpus
from raygpt.data.order import BatchSchedule, Segments, windows_in
from raygpt.data.prepare import prepare
from raygpt.data.reader import ReadPlan, validation_windows
from raygpt.data.tokenizer import BYTE_TOKENS, GPT2_TOKENS, load_tokenizer
from raygpt.errors import UserError
from raygpt.sizes import num_params
from raygpt.storage import Folder
from raygpt.train.tree import most_sums
from raygpt.values import to_dict

_UPLOADED = "working_dir_files"
"""Part of the path at which Ray unpacks ``--working-dir`` on a node."""
_EMBEDDED_TEXT = "tinyshakespeare.txt"
_EMBEDDED_CHUNK_WINDOWS = 4
"""Few, for a lane goes through one chunk after the other: with 127 windows in a chunk the loss of
the ``shakespeare`` run was 0.06 nats higher, since its two lanes hardly mix the text."""
_EMBEDDED_VAL_FRACTION = 0.1
_VOCAB_PADDING = 1024
"""A vocabulary padded by more than to the next multiple of this was meant for another corpus."""

# What may change when a run goes on; all other settings make the model or the order of data.
_CHANGEABLE = {
    *("run.name", "run.storage", "run.storage_patience", "run.mlflow", "run.wandb"),
    *("data.corpus", "data.val_corpus", "data.segment_steps"),
    *("train.steps", "train.log_every", "train.eval_every", "train.eval_tokens"),
    *("train.checkpoint_every", "train.sample_prompt", "train.sample_tokens"),
    *("train.straggler_factor", "train.activation_checkpointing", "train.profile"),
    *("scale.workers", "scale.gpus_per_worker", "scale.cpus_per_worker"),
}


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know."""

    config: Config
    plan: ReadPlan
    val_corpus: str
    val_windows: int
    """Windows of the fixed validation set; 0: no validation."""
    tokenizer: str
    tokenizer_hash: str
    n_vocab: int
    token_bytes: int
    """Bytes of a token in the corpus."""
    epoch_windows: int
    dropped_tokens: int
    """Tokens in no window: the tails of chunks."""

    @property
    def run(self) -> Folder:
        """The run's folder."""
        return Folder.from_path(self.config.run.storage).child(self.config.run.name)

    @cached_property
    def schedule(self) -> BatchSchedule:
        return self.plan.schedule()

    def segments(self, start: int) -> Segments:
        """The segments of a group of workers that starts at a step; stream and workers agree."""
        config = self.config
        return Segments(start, config.train.steps, config.segment_steps, config.batch.lanes)

    @property
    def warmup_tokens(self) -> int:
        return self.config.optim.warmup_steps * self.config.batch.tokens

    @property
    def decay_tokens(self) -> int:
        """By default the cosine ends with the run."""
        return self.config.optim.decay_tokens or self.schedule.tokens_before(
            self.config.train.steps
        )

    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to go on: settings, corpora, schedule."""
        settings = {
            f"{section}.{name}": value
            for section, values in self.settings().items()
            for name, value in values.items()
            if f"{section}.{name}" not in _CHANGEABLE
        }
        betas = list(self.config.optim.betas)  # as JSON has it
        return {**settings, "optim.betas": betas, "corpus fingerprint": self.plan.fingerprint}

    def settings(self) -> dict[str, Any]:
        """Every setting, resolved, as in config.json; also good as a settings file."""
        optim = replace(
            self.config.optim, min_lr=self.config.min_lr, decay_tokens=self.decay_tokens
        )
        data = replace(self.config.data, segment_steps=self.config.segment_steps)
        if data.corpus != EMBEDDED_CORPUS:
            data = replace(data, corpus=self.plan.corpus)
        if data.val_corpus is not None:
            data = replace(data, val_corpus=self.val_corpus)
        return to_dict(replace(self.config, optim=optim, data=data))

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of its run, in JSON values."""
        return {
            "settings": self.settings(),
            "corpus": {
                "path": self.plan.corpus,
                "fingerprint": self.plan.fingerprint,
                "tokenizer": self.tokenizer,
                "tokenizer_hash": self.tokenizer_hash,
                "n_vocab": self.n_vocab,
            },
            "identity": self.identity(),
        }


def resolve(config: Config) -> Job:
    """Open the corpora and work out the rest.

    Raises:
        UserError: there is no such corpus, it is damaged or too short, or it does not fit the
            model or the batch.
    """
    config = with_absolute_storage(config)
    corpus = open_corpus(_corpus_path(config))
    corpus.check_files()
    _check_vocabulary(config, corpus)
    plan = ReadPlan.from_config(config, corpus)
    order = plan.order(corpus)
    need = plan.windows * plan.lanes
    if order.epoch_windows < need:
        raise UserError(
            f"corpus {corpus.path} has {order.epoch_windows:,} windows of "
            f"{plan.block_size} tokens, fewer than the {need:,} of one batch; lower batch.tokens "
            "or model.block_size, or prepare more text"
        )
    val_corpus = corpus
    if config.data.val_corpus is not None:
        val_corpus = open_corpus(config.data.val_corpus)
        val_corpus.check_files()
        if val_corpus.tokenizer_hash != corpus.tokenizer_hash:
            raise UserError(
                f"data.val_corpus {val_corpus.path} was made with tokenizer "
                f"{val_corpus.tokenizer!r}, data.corpus with {corpus.tokenizer!r}; prepare both "
                "with the same"
            )
    val_windows = validation_windows(val_corpus, plan.block_size, config.train.eval_tokens)
    if config.train.eval_tokens and not val_windows:
        raise UserError(
            f"corpus {val_corpus.path} has no validation window of {plan.block_size} tokens; "
            "prepare it with a larger --val-fraction, give data.val_corpus, or set "
            "train.eval_tokens 0 for no validation"
        )
    return Job(
        config=config,
        plan=plan,
        val_corpus=val_corpus.path,
        val_windows=val_windows,
        tokenizer=corpus.tokenizer,
        tokenizer_hash=corpus.tokenizer_hash,
        n_vocab=corpus.n_vocab,
        token_bytes=corpus.dtype.itemsize,
        epoch_windows=order.epoch_windows,
        dropped_tokens=sum(
            chunk.tokens - (windows * plan.block_size + 1 if windows else 0)
            for chunk in corpus.chunks("train")
            for windows in [windows_in(chunk.tokens, plan.block_size)]
        ),
    )


def with_absolute_storage(config: Config) -> Config:
    """``run.storage`` as every process understands it.

    A relative path begins in the working directory; but in a submitted job, whose directory is
    an upload that Ray deletes in time, in the home folder.
    """
    here = Path.cwd()
    base = Path.home() if _UPLOADED in here.parts else here
    storage = config.run.storage
    if "://" not in storage:
        storage = str(base / Path(storage).expanduser())
    storage = Folder.from_path(storage).uri
    return replace(config, run=replace(config.run, storage=storage))


def _check_vocabulary(config: Config, corpus: Corpus) -> None:
    most = _padded(corpus.n_vocab, _VOCAB_PADDING)
    if not corpus.n_vocab <= config.model.vocab_size <= most:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size} does not fit corpus {corpus.path}, whose "
            f"tokenizer {corpus.tokenizer!r} has {corpus.n_vocab} tokens; use another corpus, or "
            f"set --model.vocab_size {_padded(corpus.n_vocab, 64)}"
        )
    try:
        tokenizer = load_tokenizer(corpus.tokenizer)
    except UserError as error:
        raise UserError(f"corpus {corpus.path}: {error}") from error
    if tokenizer.hash != corpus.tokenizer_hash:
        raise UserError(
            f"corpus {corpus.path} was made with another tokenizer {corpus.tokenizer!r} than the "
            "one raygpt has; prepare it anew"
        )


def _corpus_path(config: Config) -> str:
    path = config.data.corpus
    if not path:
        raise UserError(
            f"data.corpus is not set; give --data.corpus with the folder that jobs/prepare.py "
            f"wrote, or --data.corpus {EMBEDDED_CORPUS} for the text in the package"
        )
    return _embedded_corpus(config) if path == EMBEDDED_CORPUS else path


def _embedded_corpus(config: Config) -> str:
    """The embedded text as a corpus beside the runs; made on first use."""
    tokenizer = _embedded_tokenizer(config.model.vocab_size)
    chunk_tokens = _EMBEDDED_CHUNK_WINDOWS * config.model.block_size + 1
    folder = Folder.from_path(config.run.storage).child(
        f"{EMBEDDED_CORPUS}-{tokenizer}-{chunk_tokens}"
    )
    if not folder.exists(MANIFEST):
        folder.delete()  # what an interrupted start left
        text = resources.files("raygpt") / "assets" / _EMBEDDED_TEXT
        with resources.as_file(text) as path:
            prepare(
                [str(path)],
                folder.uri,
                tokenizer,
                val_fraction=_EMBEDDED_VAL_FRACTION,
                chunk_tokens=chunk_tokens,
                on_ray=False,
            )
    return folder.uri


def _embedded_tokenizer(vocab_size: int) -> str:
    """What fills ``model.vocab_size``: GPT-2's tokens, as many of its first as fit, or bytes."""
    if vocab_size >= GPT2_TOKENS:
        return "gpt2"
    return "bytes" if vocab_size <= _padded(BYTE_TOKENS, 64) else f"gpt2-{vocab_size}"


def _padded(n_vocab: int, multiple: int) -> int:
    return -(-n_vocab // multiple) * multiple


def check_identity(job: Job, earlier: dict[str, Any]) -> None:
    """Refuse to go on with a run whose model or data order would change.

    Args:
        earlier: :meth:`Job.identity` as the run's checkpoint has it.

    Raises:
        UserError: names each setting with its old and its new value.
    """
    now = job.identity()
    # A setting that an earlier raygpt did not have was what is its default now.
    defaults = {
        f"{section}.{name}": value
        for section, values in to_dict(Config()).items()
        for name, value in values.items()
    }
    earlier = {**{name: defaults[name] for name in now if name in defaults}, **earlier}
    changes = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in {**earlier, **now}
        if earlier.get(name) != now.get(name)
    ]
    if changes:
        raise UserError(
            f"run {job.run} cannot go on with other settings: {'; '.join(changes)}; set them back, "
            "or give another --run.name"
        )


def shown_settings(job: Job) -> dict[str, str]:
    """Every setting, resolved, a line a section; printed at the start of a run."""

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:g}"
        if isinstance(value, tuple):
            return " ".join(map(shown, value))
        return "-" if value in (None, "") else repr(value).strip("'")

    return {
        section: ", ".join(f"{name} {shown(value)}" for name, value in values.items())
        for section, values in job.settings().items()
    }


def derived(job: Job) -> dict[str, str]:
    """Every number that follows from the settings, in words; printed at the start of a run."""
    config, plan, schedule = job.config, job.plan, job.schedule
    parameters = num_params(config.model)
    g, lanes, micro = plan.windows, plan.lanes, config.batch.micro
    steps, tokens = config.train.steps, schedule.tokens_before(config.train.steps)
    epoch_tokens = job.epoch_windows * plan.block_size
    micros = -(-g // micro)
    scale = config.scale
    sums = most_sums(lanes, scale.min_workers, scale.max_workers)
    ramp = ""
    if plan.ramp_tokens:
        ramp = f" (from {config.batch.ramp_start_tokens:,}, over {plan.ramp_tokens:,} tokens)"
    return {
        "run": str(job.run),
        "corpus": f"{plan.corpus} ({job.tokenizer}, {plan.fingerprint[:12]})",
        "training tokens": f"{epoch_tokens:,} in {job.epoch_windows:,} windows; "
        f"{job.dropped_tokens:,} in chunk tails dropped",
        "validation tokens": f"{job.val_windows * plan.block_size:,}",
        "parameters": f"{parameters:,}",
        "vocabulary": f"{config.model.vocab_size:,} ({job.n_vocab:,} tokens and "
        f"{config.model.vocab_size - job.n_vocab} of padding)",
        "batch": f"{config.batch.tokens:,} tokens{ramp}",
        "lanes": f"{lanes}, each with {g} windows of {plan.block_size} a step",
        "accumulation": f"{micros} micro-batches of {min(micro, g)} windows a lane, "
        f"{micros * lanes} a step",
        "steps": f"{steps:,}, {tokens:,} tokens, {tokens / epoch_tokens:.2f} epochs",
        "steps per epoch": f"{epoch_tokens / config.batch.tokens:,.1f} of the full batch",
        "learning rate": f"{config.optim.max_lr:g} after {job.warmup_tokens:,} tokens, "
        f"{config.min_lr:g} from {job.decay_tokens:,} on",
        "segment": f"{config.segment_steps:,} steps",
        "workers": f"{config.scale.workers}; 1 to {lanes} are legal, all give the same model",
        "weights and optimizer": f"{_gib(4 * parameters)} + {_gib(8 * parameters)} "
        f"+ gradients {_gib(4 * parameters * sums)} (sums of lanes: {sums}) a worker",
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
