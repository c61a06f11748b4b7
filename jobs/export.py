"""Write a checkpoint as a folder that transformers loads.

python jobs/export.py --checkpoint DIR --output DIR
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from raygpt.cli import parse, run_job
from raygpt.data.tokenizer import load_tokenizer
from raygpt.export import export
from raygpt.train.state import load_model


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Checkpoint folder, or a run's folder: then its best or latest checkpoint."""
    output: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder or URI to write; must be empty or not exist."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    loaded = load_model(arguments.checkpoint, print)
    tokenizer = load_tokenizer(loaded.tokenizer_name)
    files = export(loaded.model, loaded.config.model, tokenizer, arguments.output)
    print(f"exported {loaded.path}, step {loaded.step}, to {arguments.output}: {', '.join(files)}")


if __name__ == "__main__":
    run_job(main)
