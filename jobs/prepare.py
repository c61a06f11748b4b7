"""Turn text into a corpus for training, as a Ray Data job.

    python jobs/prepare.py --input PATH... --output CORPUS [--tokenizer gpt2|gpt2-N|bytes]

Runs alone on one machine, or on a cluster with ``ray job submit --working-dir . --``.
"""

import time
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from raygpt.cli import parse, run_job
from raygpt.data.corpus import SPLITS
from raygpt.data.prepare import Summary, prepare

PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Arguments:
    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")]
    """Files, folders and globs, local or cloud: text, JSON lines, Parquet; also .gz and .zst."""
    output: Annotated[str, tyro.conf.arg(metavar="CORPUS")]
    """Folder or URI of the corpus; must be empty or not exist."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="gpt2|gpt2-N|bytes")] = "gpt2"
    """Byte-pair encoding of GPT-2, of its first N tokens, or one token for each byte."""
    text_column: str = "text"
    """Column of the text in JSON lines and Parquet."""
    val_fraction: float = 0.005
    """Share of the documents kept for validation."""


class Progress:
    """A line now and then; jobs have no terminal to draw a bar in."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            print(f"prepared {done:,} of {total:,} fragments", flush=True)


def table(summary: Summary) -> Table:
    """The summary, one line a number."""
    tokens = sum(summary.tokens.values())
    result = Table(title="Corpus", show_header=False)
    result.add_column()
    result.add_column(justify="right", overflow="fold")
    rows = {
        "input files": f"{summary.files:,}",
        "input bytes": f"{summary.input_bytes:,}",
        "empty documents left out": f"{summary.empty:,}",
        "invalid characters replaced": f"{summary.replaced:,}",
    }
    for split in SPLITS:
        documents = "part of 1" if summary.divided else f"{summary.documents[split]:,}"
        rows |= {
            f"{split} documents": documents,
            f"{split} tokens": f"{summary.tokens[split]:,}",
            f"{split} shards": f"{summary.shards[split]:,}",
            f"{split} chunks": f"{summary.chunks[split]:,}",
        }
    rows |= {
        "seconds": f"{summary.seconds:.1f}",
        "tokens per second": f"{tokens / summary.seconds:,.0f}",
        "corpus": summary.path,
    }
    for name, value in rows.items():
        result.add_row(name, value)
    return result


def main() -> None:
    arguments = parse(Arguments, __doc__)
    summary = prepare(
        list(arguments.input),
        arguments.output,
        arguments.tokenizer,
        text_column=arguments.text_column,
        val_fraction=arguments.val_fraction,
        progress=Progress(),
    )
    Console().print(table(summary))


if __name__ == "__main__":
    run_job(main)
