"""A Ray on this machine for one job, with no more processes than training needs.

``ray.init`` would also start a server of pages, its agent, a process that follows logs, and one
that asks for machines.  Nobody uses them here, and they and the timers of the others take time from
workers that have all cores.  The processes that do the work are copies of a template.

What it gives up: to be independent of Ray's insides; that Ray's own tools (``ray list``) and
Prometheus can look at a local run.
"""

import logging
import os
import subprocess
import sys
from typing import Any

import ray
import ray._private.node
from ray._private import services
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray._private.services import start_ray_process
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    persist_port,
)

from raygpt.train import agent, forked
from raygpt.train.template import Template

_SETTINGS = {
    # Defaults of Ray in parentheses.  A user's own settings of these variables go first.
    "RAY_worker_niceness": "0",  # (15) its helpers would go before what trains
    "RAY_prestart_worker_first_driver": "0",  # (1) processes that no worker can use
    # (the CPUs) how many processes may start at once
    "RAY_worker_maximum_startup_concurrency": str(max(8, os.cpu_count() or 1)),
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # (1) nobody drains this machine
    # What its processes do again and again, most of it every tenth of a second.
    "RAY_event_stats": "0",  # (1)
    "RAY_enable_metrics_collection": "0",  # (1) nobody asks for them
    "RAY_task_events_report_interval_ms": "0",  # (1000) for the server of pages
    "RAY_raylet_check_gc_period_milliseconds": "1000",  # (100)
    "RAY_object_manager_timer_freq_ms": "1000",  # (100)
    "RAY_local_fs_monitor_interval_ms": "1000",  # (100)
    "RAY_kill_idle_workers_interval_ms": "1000",  # (200)
    "RAY_idle_worker_killing_time_threshold_ms": "600000",  # (1000) a reader between two blocks
    # (1000 and 10) Ray's daemon asks itself, first before it can answer.
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "600",
}
_AGENT = "--dashboard_agent_command="
_AGENT_SERVICES = (
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
)
_NOT_IN_USE = -1  # as the agent of a minimal installation says it


def start(template: Template | None) -> None:
    """Start Ray here and connect to it; it ends with this process.

    Args:
        template: what its processes shall be copies of.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)

    class LeanNode(Node):
        def __init__(self, ray_params: RayParams, **arguments: Any) -> None:
            if template is not None:
                os.environ[forked.TEMPLATE] = template.address
                ray_params.setup_worker_path = forked.__file__
            ray_params.include_log_monitor = False  # type: ignore[assignment]
            ray_params.no_monitor = True
            super().__init__(ray_params, **arguments)

        def start_api_server(self, **_: Any) -> None:
            self._webui_url = ""

        def start_raylet(self, *arguments: Any, **more: Any) -> None:
            for service in _AGENT_SERVICES:
                persist_port(self.get_session_dir_path(), self._node_id, service, _NOT_IN_USE)
            services.start_ray_process = _start_with_idle_agent
            try:
                super().start_raylet(*arguments, **more)
            finally:
                services.start_ray_process = start_ray_process
            if template is not None:
                template.serve(self.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)

    ray._private.node.Node = LeanNode  # type: ignore[misc, assignment]
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    finally:
        ray._private.node.Node = Node  # type: ignore[misc]
        os.environ.pop(forked.TEMPLATE, None)  # Ray's processes have it


def _start_with_idle_agent(command: list[str], *arguments: Any, **more: Any) -> Any:
    idle = _AGENT + subprocess.list2cmdline([sys.executable, "-S", agent.__file__])
    command = [idle if option.startswith(_AGENT) else option for option in command]
    return start_ray_process(command, *arguments, **more)
