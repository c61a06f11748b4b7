"""Folders of runs as a driver and its workers leave them, with steps of a second each."""

import json
import time
from typing import Any

from logged import record

from raygpt.config import Config
from raygpt.runs.files import CONFIG, EVENTS, SAMPLES, read_json_lines
from raygpt.storage import Folder
from raygpt.train.progress import RunLog
from raygpt.values import to_dict

MACHINES = [{"address": "10.0.0.2", "device": "L4", "cpus": 4, "memory": 16 << 30, "workers": 2}]


def tell(
    run: Folder,
    done: int,
    steps: int = 40,
    ended: float = 0.0,
    last_event: str = "checkpoint",
    **settings: Any,
) -> None:
    """A run that has done some of its steps, in two starts.

    Args:
        ended: unix time of its last step; by default now.
        settings: of the section optim.
    """
    config = to_dict(Config())
    config["train"]["steps"] = steps
    config["run"]["name"] = run.split()[1]
    config["optim"] |= settings
    run.write_bytes(CONFIG, json.dumps(config).encode())
    run.write_bytes(SAMPLES, b"--- step 10\n\nO Romeo\n--- step 20\n\nO <b>Juliet</b>\n")
    began = (ended or time.time()) - done
    for first, stop in ((0, done // 2), (done // 2, done)):
        log = RunLog(run, first)
        log.event("start", first, "2 workers on <i>L4</i>", machines=MACHINES)
        for step in range(first, stop):
            changes = (
                {"val_loss": 3.0 - step / 100, "val_loss_per_byte": 1.5 - step / 200}
                if step % 10 == 9
                else {}
            )
            log.step(record(step, time=began + step + 1, **changes), board=False)
        log.event(last_event, stop, "as asked")
        log.close()
    events = [e | {"time": began + e["step"]} for e in read_json_lines(run, EVENTS)]
    run.write_bytes(EVENTS, b"".join(json.dumps(e).encode() + b"\n" for e in events))
