"""Which machines an elastic run may count on.

Ray Train asks a coordinator that looks at the cluster every 20 seconds.  So a machine that has
just died still counts, and a group that was to run there waits for its time-out; a machine that
will be drained counts until it is gone; and a new one is not seen.  Here the coordinator looks
before it answers, and machines that will go or do not answer are left out.

A machine that comes while a group trains counts once it has the job's files and its template, so
the pause of a resize is no longer than that after a loss.
"""

import contextlib
import logging
import math
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from typing import Any

import ray
from ray import ObjectRef
from ray._private.state import state as ray_state
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy import (
    autoscaling_coordinator_client as claims,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raygpt.train import processes

logger = logging.getLogger("ray.train")
ANSWER_SECONDS = 1.0
"""In which a machine takes a connection: its kernel does, however busy it is."""
COORDINATOR_SECONDS = 10.0
CLAIM_SECONDS = 30
"""How long a run's claim on the cluster outlives its driver; renewed while that lives.  With
Ray's 180 s, the successor of a driver that was killed would wait so long for the same machines."""
TOGETHER_SECONDS = 10.0
"""How long a machine that is ready waits for others that are not yet."""

Reserved = dict[str, dict[str, float]]
"""Resources that are kept for a run, by node."""


class Scout:
    """A process with the environment of a worker: where it is, another one starts at once."""


class Newcomers:
    """Machines that came while a group trained: those that could start a worker at once count."""

    def __init__(self) -> None:
        self._known = set[str]()
        self._sent = dict[str, tuple[ActorHandle, ObjectRef]]()
        self._ready_since = math.inf

    def add_known(self, nodes: Iterable[str]) -> None:
        """Count on these: a group starts on them, ready or not."""
        self._known |= set(nodes)
        for node in self._known & self._sent.keys():
            del self._sent[node]  # and with it the process

    def choose(self, nodes: Iterable[str]) -> set[str]:
        """Those that are known or have become ready, which each is asked for once.

        Machines that come together count together, since each resize is a pause.
        """
        new = set(nodes) - self._known
        for node in new - self._sent.keys():
            self._sent[node] = send_scout(node)
        # Ready is also where a scout failed: what is wrong there, workers will tell.
        ready = {node for node in new if ray.wait([self._sent[node][1]], timeout=0)[0]}
        now = time.monotonic()
        self._ready_since = min(self._ready_since, now) if ready else math.inf
        if ready == new or now - self._ready_since > TOGETHER_SECONDS:
            self.add_known(ready)
            self._ready_since = math.inf
        return self._known & set(nodes)


def send_scout(node: str) -> tuple[ActorHandle, ObjectRef]:
    """Start a scout on a machine; the reference can be had once it is there, or has failed."""
    actor: Any = ray.remote(Scout)
    scout = actor.options(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        runtime_env=processes.runtime_env(alone=False, trains=True),
    ).remote()
    return scout, scout.__ray_ready__.remote()


class LivingMachines(ElasticScalingPolicy):
    """Ray Train's policy for elastic runs, on machines that are there and will stay."""

    _starting = False

    def __init__(self, scaling_config: Any) -> None:
        super().__init__(scaling_config)
        self._newcomers = Newcomers()

    def after_controller_start(self, train_run_context: Any) -> None:
        claims.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = CLAIM_SECONDS
        claims.AUTOSCALING_REQUESTS_INTERVAL_S = CLAIM_SECONDS // 3
        super().after_controller_start(train_run_context)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._starting = True
        try:
            return super().make_decision_for_non_running_worker_group()
        finally:
            self._starting = False

    def _get_reserved_resources(self) -> Reserved | None:
        try:
            reserved: Reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=COORDINATOR_SECONDS,
            )
            # A group that runs notices by itself what does not answer.
            found = staying(reserved, answering=self._starting)
            if self._starting:
                self._newcomers.add_known(found)
            return {node: found[node] for node in self._newcomers.choose(found)}
        except Exception:  # asked again soon; until then nothing changes, as in Ray's own policy
            logger.warning("cannot ask for the resources of the run", exc_info=True)
            return None


def staying(reserved: Reserved, answering: bool) -> Reserved:
    """Of the machines that are kept for a run, those that live and will not be drained.

    Args:
        answering: only those that take a connection, too.
    """
    going = ray_state.get_draining_nodes()
    nodes = [
        node
        for node in ray.nodes()
        if node["NodeID"] in reserved and node["Alive"] and node["NodeID"] not in going
    ]
    if answering and nodes:
        with ThreadPoolExecutor(len(nodes)) as threads:
            answers = list(threads.map(_answers, nodes))
        nodes = list(compress(nodes, answers))
    return {node["NodeID"]: reserved[node["NodeID"]] for node in nodes}


def _answers(node: dict[str, Any]) -> bool:
    """Whether a machine takes a connection; Ray itself needs seconds to find out."""
    place = node["NodeManagerAddress"], node["NodeManagerPort"]
    with contextlib.suppress(OSError):
        socket.create_connection(place, timeout=ANSWER_SECONDS).close()
        return True
    return False
