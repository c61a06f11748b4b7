"""Spot notices: where the cloud says that it takes a machine back, Ray is told to drain it.

Ray's cluster launcher does not listen to them.  Drained, a machine is one that Ray Train and the
next group of workers know about: a checkpoint comes first, and nobody starts there again.
AWS says it two minutes ahead, Google Cloud thirty seconds.  What it gives up: other clouds, and
Kubernetes, whose own tools drain nodes.
"""

import contextlib
import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
ANSWER_SECONDS = 2.0
GOOGLE_SECONDS = 30.0
"""Between Google's notice and the end."""
_LINK_LOCAL = "http://169.254.169.254"
_TOKEN_SECONDS = 21600
_VENDOR = Path("/sys/class/dmi/id/sys_vendor")

_NO_ANSWER = (
    *(OSError, http.client.HTTPException, ValueError, KeyError, TypeError),
    ray.exceptions.RayError,
)

Look = Callable[[], float | None]
"""The unix time at which this machine ends; None as long as there is no notice."""


def watch(say: Callable[[str], None]) -> None:
    """Wait in the background for the notice of this machine, and let Ray drain it then; on
    machines of no known cloud, do nothing.

    Args:
        say: told when it comes.
    """
    look = this_cloud()
    if look is not None:
        threading.Thread(target=_wait, args=(look, say), name="notice", daemon=True).start()


def this_cloud() -> Look | None:
    """How to look for a notice here; the variables are those of the clouds' own tools."""
    vendor = ""
    with contextlib.suppress(OSError):
        vendor = _VENDOR.read_text()
    aws = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    google = os.environ.get("GCE_METADATA_HOST")
    off = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    if (aws or "Amazon" in vendor) and not off:
        return lambda: aws_notice(aws or _LINK_LOCAL)
    if google or "Google" in vendor:
        return lambda: google_notice(f"http://{google}" if google else _LINK_LOCAL)
    return None


def aws_notice(endpoint: str) -> float | None:
    """The end of a spot instance by its metadata service, version 2. Raises OSError."""
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
    token = _fetch(f"{endpoint}/latest/api/token", ttl, "PUT")
    try:
        answer = _fetch(
            f"{endpoint}/latest/meta-data/spot/instance-action",
            {"X-aws-ec2-metadata-token": token},
        )
    except urllib.error.HTTPError as error:
        if error.code == 404:  # there is no notice
            return None
        raise
    return datetime.fromisoformat(json.loads(answer)["time"]).timestamp()


def google_notice(endpoint: str) -> float | None:
    """The end of a spot instance by its metadata server. Raises OSError."""
    url = f"{endpoint}/computeMetadata/v1/instance/preempted"
    preempted = _fetch(url, {"Metadata-Flavor": "Google"}).strip() == "TRUE"
    return time.time() + GOOGLE_SECONDS if preempted else None


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def _wait(look: Look, say: Callable[[str], None]) -> None:
    said = False
    while True:
        try:
            end = look()
            if end is not None:
                if not said:
                    left = end - time.time()
                    address = ray.util.get_node_ip_address()
                    say(f"the cloud takes {address} back in {left:.0f} s; making way")
                    said = True
                drain(end)
                return
        except _NO_ANSWER:  # neither of the cloud nor of Ray; the next time there may be one
            logger.debug("no answer about notices", exc_info=True)
        time.sleep(POLL_SECONDS)


def drain(end: float) -> None:
    """Tell Ray that this machine goes.

    Args:
        end: when, in unix seconds.

    Raises:
        RayError: Ray does not answer.
    """
    context = ray.get_runtime_context()
    client = GcsClient(address=context.gcs_address)
    reasons = autoscaler_pb2.DrainNodeReason  # type: ignore[attr-defined]
    reason = reasons.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why_not = client.drain_node(
        context.get_node_id(), reason, "spot notice", int(1000 * end)
    )
    if not accepted:
        logger.warning("Ray does not drain this machine: %s", why_not)
