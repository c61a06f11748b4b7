"""Sample text from a checkpoint.

    python jobs/sample.py --checkpoint DIR --prompt TEXT

DIR is a checkpoint folder or a run's folder.  Every sequence is printed and written to --output.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from raygpt.cli import parse, run_job
from raygpt.data.tokenizer import load_tokenizer
from raygpt.device import local_device
from raygpt.generate import sample_text
from raygpt.storage import write_output
from raygpt.train.state import load_model


@dataclass(frozen=True)
class Arguments:
    checkpoint: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Checkpoint folder, or a run's folder: then its best or latest checkpoint."""
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """What every sequence begins with."""
    num_return_sequences: int = 5
    """Sequences to sample."""
    max_length: int = 30
    """Tokens of a sequence, prompt included."""
    top_k: int = 50
    """Sample among the k most likely tokens."""
    temperature: float = 1.0
    """Below 1 keeps to likely tokens, above 1 strays; 0 takes the most likely one."""
    seed: int = 42
    """Key of the draws: the same seed gives the same text."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = "output.txt"
    """File that receives the sequences, too; one of that name is replaced."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    loaded = load_model(arguments.checkpoint, print)
    print(f"{loaded.path}, step {loaded.step}", flush=True)
    texts = sample_text(
        loaded.model.to(local_device()),
        load_tokenizer(loaded.tokenizer_name),
        arguments.prompt,
        num_return_sequences=arguments.num_return_sequences,
        max_length=arguments.max_length,
        top_k=arguments.top_k,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    shown = "".join(f"> {text}\n" for text in texts)
    print(shown, end="", flush=True)
    print(write_output(arguments.output, shown.encode()))


if __name__ == "__main__":
    run_job(main)
