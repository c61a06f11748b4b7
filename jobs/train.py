"""Train a model, from text to checkpoints; submit it again and it goes on.

    python jobs/train.py [PRESET] [--config FILE] [--dry-run] [--SECTION.FIELD VALUE ...]

Runs alone on one machine, or on a cluster with ``ray job submit --working-dir . --``.
"""

import sys
import time

from raygpt.cli import run_job
from raygpt.settings import load_settings
from raygpt.train.driver import run


def main() -> None:
    began = time.time()
    config, dry_run = load_settings(sys.argv[1:], __doc__)
    run(config, dry_run, began)


if __name__ == "__main__":
    run_job(main)
