"""Who stops a run gets a checkpoint, and the weights at the end are those of a quiet run."""

import signal
import time

from head import Head
from metadata import Metadata
from troubled import EVERY, Reference, finish, wait_for


def test_ctrl_c_ends_in_a_checkpoint(head: Head, reference: Reference) -> None:
    run = reference.run(str(reference.settings.parent / "storage"), "interrupted", head)
    process = run.start()
    wait_for(process, lambda: len(run.rows()) > EVERY // 2)
    process.send_signal(signal.SIGINT)
    output = finish(process, status=130)
    assert "stopped; submit the run again, and it goes on" in output and "Traceback" not in output
    stopped_at = len(run.rows())
    assert run.has_checkpoint(stopped_at)
    finish(run.start_here("--scale.workers", "1"))  # elsewhere
    assert [event["step"] for event in run.events("start")] == [0, stopped_at]
    assert run.result() == reference.result
    assert run.redone() == []


def test_a_spot_notice_costs_no_step(head: Head, reference: Reference) -> None:
    """A machine that will go is left before it goes, also by a run of a fixed size; it goes on
    where there is room again, and nobody comes back to that machine."""
    run = reference.run(reference.storage, "noticed", head)
    with Metadata() as service:
        nodes = [
            head.add_node(
                1,
                AWS_EC2_METADATA_SERVICE_ENDPOINT=f"http://{service.host}",
                AWS_EC2_METADATA_DISABLED="false",
            )
        ]
        nodes[0].wait()
        process = run.start("--scale.workers", "3", "--train.steps", "50000")
        try:
            wait_for(process, lambda: bool(run.rows()) and service.asked.is_set())
            service.end = time.time() + 60
            wait_for(process, lambda: bool(run.events("leave")))
            assert time.time() < service.end, "it was left when it was gone"
            nodes.append(head.add_node(1))
            wait_for(process, lambda: len(run.events("start")) == 2)
            assert not nodes[0].workers() and nodes[1].workers()
            process.send_signal(signal.SIGTERM)
            output = finish(process, status=128 + signal.SIGTERM)
        finally:
            process.kill()
            for node in nodes:
                node.kill()
                head.nodes.remove(node)
    assert "the cloud takes" in output
    assert [row["world_size"] for row in run.rows()] == [3] * len(run.rows())
    assert run.redone() == []
