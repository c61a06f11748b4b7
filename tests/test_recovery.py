"""Who stops a run gets a checkpoint, and the weights at the end are those of a quiet run."""

import signal

from head import Head
from troubled import EVERY, Reference, finish, wait_for


def test_ctrl_c_ends_in_a_checkpoint(head: Head, reference: Reference) -> None:
    run = reference.run(str(reference.settings.parent / "storage"), "interrupted")
    process = run.start()
    wait_for(process, lambda: len(run.rows()) > EVERY // 2)
    process.send_signal(signal.SIGINT)
    output = finish(process, status=130)
    assert "stopped; submit the run again, and it goes on" in output and "Traceback" not in output
    stopped_at = len(run.rows())
    assert run.has_checkpoint(stopped_at)
    finish(run.start("--scale.workers", "1"))
    assert [event["step"] for event in run.events("start")] == [0, stopped_at]
    assert run.result() == reference.result
    assert run.redone() == []
