"""One page that shows a run, or compares several; all in one file that opens anywhere.

The curves are drawn by uPlot, which the file contains.  What it gives up: single steps of long
runs, of which only means and extremes are shown.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from raygpt import __version__
from raygpt.runs.accounts import COUNTED
from raygpt.runs.curves import Curves
from raygpt.runs.history import RUNNING, History

EVENTS_SHOWN = 200
SAMPLES_SHOWN = 12
_COLOURS = (("steps", 0), ("data wait", 1), ("validation", 1), ("checkpoint", 2), ("redone", 3))
"""Colour of a kind of time by how its name begins; restarts have 3, the rest 4."""


@dataclass(frozen=True)
class Facts:
    """What the folder of a run does not tell, but its driver knows."""

    plan: dict[str, str]
    """Every number that follows from the settings, in words."""
    state: str
    text: str = ""
    """More about the state, such as why it failed."""


def render_report(history: History, facts: Facts, now: float | None = None) -> str:
    """The report of a run as HTML."""
    now = now or time.time()
    last = history.curves.last or {}
    events = [_shown_event(event) for event in reversed(history.events)]
    return _render(
        "report.html.j2",
        [history],
        now,
        running=facts.state == RUNNING,
        name=history.name,
        place=history.folder.uri,
        state={"kind": facts.state, "text": facts.text},
        done=history.done,
        steps=history.steps,
        percent=round(100 * history.done / history.steps, 1),
        remaining=_remaining(history) if facts.state == RUNNING else "",
        figures=_figures(history, last),
        accounts=_accounts(history),
        samples=[{"step": s, "text": t} for s, t in reversed(history.samples)][:SAMPLES_SHOWN],
        events=events[:EVENTS_SHOWN],
        dropped_events=max(0, len(events) - EVENTS_SHOWN),
        machines=_machines(history),
        plan=facts.plan,
        settings={
            section: {name: _plain(value) for name, value in values.items()}
            for section, values in history.settings.items()
        },
    )


def render_comparison(
    histories: Sequence[History],
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    place: str,
    now: float | None = None,
) -> str:
    """Several runs over each other as HTML.

    Args:
        heads: columns of the table above the curves.
        rows: one for each run.
    """
    flat = [
        {f"{section}.{name}": _plain(v) for section, part in h.settings.items()
         for name, v in part.items()}
        for h in histories
    ]  # fmt: skip
    names = sorted({name for settings in flat for name in settings} - {"run.name"})
    values = {name: [settings.get(name, "-") for settings in flat] for name in names}
    return _render(
        "compare.html.j2",
        histories,
        now or time.time(),
        running=False,
        names=[history.name for history in histories],
        place=place,
        heads=heads,
        rows=rows,
        differences={name: found for name, found in values.items() if len(set(found)) > 1},
    )


def _render(
    template: str, histories: Sequence[History], now: float, running: bool, **values: Any
) -> str:
    data = {
        "running": running,
        "runs": [
            {
                "name": history.name,
                "curves": history.curves.columns(),
                "validations": history.curves.validation_columns(),
                "events": [{"step": e["step"], "kind": e["kind"]} for e in history.events],
            }
            for history in histories
        ],
    }
    return _templates().get_template(template).render(
        # In a script element only "</" and "<!--" would be read as HTML.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        styles=_file("assets", "uplot", "uplot.css") + _file("runs", "page", "page.css"),
        scripts=_file("assets", "uplot", "uplot.js") + "\n" + _file("runs", "page", "charts.js"),
        version=__version__,
        updated=time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now)),
        **values,
    )  # fmt: skip


@cache
def _file(*parts: str) -> str:
    return resources.files("raygpt").joinpath(*parts).read_text()


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("raygpt", "runs/page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def _figures(history: History, last: dict[str, Any]) -> list[dict[str, str]]:
    def figure(name: str, value: str, note: str = "") -> dict[str, str]:
        return {"name": name, "value": value, "note": note}

    curves = history.curves
    speed = curves.speed()
    seconds = curves.points[-1].seconds if curves.points else 0.0
    epoch = f"epoch {last['epoch']}" if last else ""
    found = [
        figure("training loss", _number(last.get("loss")), "nats a token"),
        figure(
            "validation loss",
            _number(curves.validations[-1][3] if curves.validations else None),
            _validation_note(curves),
        ),
        figure("tokens", count(last.get("tokens", 0)), epoch),
        figure("tokens a second", "-" if speed is None else count(speed), "in steps"),
        figure("workers", str(last.get("world_size", "-")), _times(history.restarts, "restart")),
        figure("time", duration(seconds), f"{history.accounts.goodput:.0%} in steps that count"),
    ]
    if last.get("mfu") is not None:
        found.insert(4, figure("MFU", f"{last['mfu']:.1%}", "of the devices' peak"))
    if last.get("skipped"):
        found.append(figure("skipped steps", f"{last['skipped']:,}", "loss or norm not finite"))
    return found


def _validation_note(curves: Curves) -> str:
    best, per_byte = curves.best, curves.val_loss_per_byte
    notes = [f"{per_byte:.4f} a byte"] if per_byte is not None else []
    notes += [f"best {best[1]:.4f} at step {best[0]:,}"] if best else []
    return ", ".join(notes)


def _times(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _remaining(history: History) -> str:
    points = history.curves.points[-20:]
    each = [p.mean("step_ms") for p in points]
    known = sorted(ms for ms in each if ms is not None)
    if not known:
        return ""
    left = (history.steps - history.done) * known[len(known) // 2] / 1000
    return f"about {duration(left)} left in steps"


def _accounts(history: History) -> list[dict[str, Any]]:
    seconds = {name: s for name, s in history.accounts.seconds.items() if s >= 0.05}
    total = sum(seconds.values())
    return [
        {
            "name": name if name != COUNTED else "steps that count",
            "seconds": round(spent, 3),
            "share": f"{spent / total:.1%}",
            "text": duration(spent),
            "colour": _colour(name),
        }
        for name, spent in seconds.items()
    ]


def _colour(name: str) -> int:
    restart = 3 if name.startswith("restart") else 4
    return next((colour for begin, colour in _COLOURS if name.startswith(begin)), restart)


def _machines(history: History) -> list[dict[str, str]]:
    """Those of the last start."""
    known = [event["machines"] for event in history.events if "machines" in event]
    found: list[dict[str, Any]] = known[-1] if known else []
    return [
        {
            "address": machine["address"],
            "workers": machine["workers"],
            "device": machine["device"],
            "cpus": machine["cpus"],
            "memory": f"{machine['memory'] / 2**30:.0f} GiB",
        }
        for machine in found
    ]


def _shown_event(event: dict[str, Any]) -> dict[str, Any]:
    at = time.strftime("%b %d %H:%M:%S", time.localtime(event["time"]))
    return {"step": event["step"], "time": at, "kind": event["kind"], "text": event["text"]}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "-" if value in (None, "") else repr(value).strip("'")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def count(value: float) -> str:
    """A number in a few digits: 12,345 or 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 3.5 h, 2.1 days."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit != "h" else f"{seconds / size:.1f} h"
    return f"{seconds / 86400:.1f} days"
