"""Who stops a run gets a checkpoint, and the weights at the end are those of a quiet run."""

import signal
import time

from head import Head
from metadata import Metadata
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


def test_a_spot_notice_costs_no_step(head: Head, reference: Reference) -> None:
    """A machine that will go is left before it goes, and nobody comes back to it."""
    run = reference.run(reference.storage, "noticed")
    with Metadata() as service:
        node = head.add_node(
            1,
            AWS_EC2_METADATA_SERVICE_ENDPOINT=f"http://{service.host}",
            AWS_EC2_METADATA_DISABLED="false",
        )
        process = run.start("--scale.workers", "1:3", "--train.steps", "1000000")
        try:
            wait_for(process, lambda: bool(run.rows()) and run.rows()[-1]["world_size"] == 3)
            assert service.asked.wait(30)
            service.end = time.time() + 60
            wait_for(process, lambda: run.rows()[-1]["world_size"] == 2)
            assert time.time() < service.end, "it was left when it was gone"
            assert not node.workers()
            process.send_signal(signal.SIGTERM)
            output = finish(process, status=128 + signal.SIGTERM)
        finally:
            process.kill()
            node.kill()
            head.nodes.remove(node)
    assert "the cloud takes" in output
    assert run.redone() == []
