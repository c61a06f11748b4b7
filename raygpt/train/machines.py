"""Which machines the next group of an elastic run may count on.

Ray Train asks a coordinator that looks at the cluster every 20 seconds.  So a machine that has
just died still counts, and a group that was to run there waits for its time-out; a machine that
will be drained counts until it is gone; and a new one is not seen.  Here the coordinator looks
before it answers, and machines that will go or do not answer are left out.
"""

import contextlib
import logging
import socket
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy

logger = logging.getLogger("ray.train")
ANSWER_SECONDS = 1.0
"""In which a machine takes a connection: its kernel does, however busy it is."""
COORDINATOR_SECONDS = 10.0


def look_before_scaling() -> None:
    """Let every elastic run that this process controls count on living machines only."""
    ElasticScalingPolicy._get_reserved_resources = _reserved  # type: ignore[method-assign, assignment]


def _reserved(policy: Any) -> dict[str, dict[str, float]] | None:
    """What the coordinator keeps for a run, by node; None if it does not say."""
    try:
        # Kept for the policy by its requester id; the attributes are Ray Train's.
        reserved = ray.get(
            policy._autoscaling_coordinator.get_reserved_resources.remote(
                policy._requester_id, recompute=True
            ),
            timeout=COORDINATOR_SECONDS,
        )
    except Exception:  # a slow answer, as a lost one, changes nothing
        logger.warning("cannot ask for the resources of the run", exc_info=True)
        return None
    going = ray_state.get_draining_nodes()
    return {
        node["NodeID"]: reserved[node["NodeID"]]
        for node in ray.nodes()
        if node["NodeID"] in reserved and node["NodeID"] not in going and _answers(node)
    }


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node takes a connection; Ray itself needs seconds to find out."""
    if not node["Alive"]:
        return False
    place = node["NodeManagerAddress"], node["NodeManagerPort"]
    with contextlib.suppress(OSError):
        socket.create_connection(place, timeout=ANSWER_SECONDS).close()
        return True
    return False
