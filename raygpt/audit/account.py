"""Sentences about what lanes used instead: like steps drawn together, and every window counted.

A window is said to be used twice if a right lane used it, too, or several wrong ones; and never
if it was due in a wrong lane and no lane used it.
"""

from collections import Counter, defaultdict

import numpy as np

from raygpt.audit.places import Label, Pair, Places, Use
from raygpt.audit.words import steps


def sentences(uses: dict[Pair, Use], right: np.ndarray, places: Places) -> list[str]:
    """A sentence for each group of pairs, by the step in which it begins.

    Args:
        uses: what wrong lanes used.
        right: (steps, L) of the lanes that used what they must.
    """
    counts: Counter[int] = Counter()
    for use in uses.values():
        counts.update(use.places.tolist())
    return [
        _head(pairs, uses, places) + _account(pairs, uses, counts, right, places)
        for pairs in _groups(uses)
    ]


def _groups(uses: dict[Pair, Use]) -> list[list[Pair]]:
    """Pairs that one sentence can hold: the same label, in the same run of steps."""
    runs: list[tuple[Label, list[Pair]]] = []
    for step, lane in sorted(uses, key=lambda pair: (pair[1], pair[0])):
        label = uses[step, lane].label
        if runs and runs[-1][0] == label and runs[-1][1][-1] == (step - 1, lane):
            runs[-1][1].append((step, lane))
        else:
            runs.append((label, [(step, lane)]))
    groups: defaultdict[object, list[Pair]] = defaultdict(list)
    for label, pairs in runs:
        if label[0] == "gap":
            groups[label] += pairs
        else:  # lanes that traded places belong together, however far
            groups[label[:2], pairs[0][0], pairs[-1][0]] += pairs
    return sorted(groups.values(), key=min)


def _head(pairs: list[Pair], uses: dict[Pair, Use], places: Places) -> str:
    kind, *values = uses[pairs[0]].label
    own = sorted({lane for _, lane in pairs})
    span = sorted({step for step, _ in pairs})
    where = f"{steps(span)}, {places.lanes(own)}"
    if kind == "gap":
        return f"from {steps(span[:1])} on {places.lanes(own)} went on without {values[0]}"
    if kind == "batch":
        return where + _source(pairs, uses, int(values[0]), own, places)
    if kind == "first":
        return f"{where} used only the first {values[0]} of {values[1]} windows"
    if kind == "shift":
        distance = int(values[0])
        side = "ahead of" if distance > 0 else "behind"
        count = f"{abs(distance)} window{'s' if abs(distance) > 1 else ''}"
        return f"{where} used windows {count} {side} their place"
    return f"{where} " + {
        "left out": "left out a window and used the next step's first",
        "doubled": "used a window twice and left out the last",
        "replaced": "used a window of the batch in the place of another",
        "order": "used the right windows in another order",
    }.get(str(kind), str(kind))


def _source(
    pairs: list[Pair], uses: dict[Pair, Use], delta: int, own: list[int], places: Places
) -> str:
    sources = {lane: lane + int(uses[step, lane].label[2]) for step, lane in pairs}
    other = [sources[lane] for lane in own]
    if delta == 0:
        if len(own) == 2 and own == sorted(other):
            return " used each other's windows"
        lanes = ", ".join(map(str, other))
        return f" used the windows of lane{'s' if len(other) > 1 else ''} {lanes}"
    text = " used the windows of " + steps({step + delta for step, _ in pairs})
    if other != own:
        text += ", " + places.lanes(other)
    return text + (" again" if delta < 0 else "")


def _account(
    pairs: list[Pair],
    uses: dict[Pair, Use],
    counts: Counter[int],
    right: np.ndarray,
    places: Places,
) -> str:
    def total(place: int) -> int:
        step, lane = places.owner(place, len(right))
        return counts[place] + (bool(right[step, lane]) if step < len(right) else 0)

    used = np.unique(np.concatenate([uses[pair].places for pair in pairs]))
    due = np.concatenate([places.of(*pair) for pair in pairs])
    often = used[[total(place) > 1 for place in used.tolist()]] if len(used) else used
    never = due[[total(place) == 0 for place in due.tolist()]]
    parts = []
    if len(often):
        most = max(total(place) for place in often.tolist())
        how = "twice" if most == 2 else f"up to {most} times"
        parts.append(f"{places.describe(often)} used {how}")
    if len(never):
        owners = {places.owner(place, len(right))[0] for place in never.tolist()}
        parts.append(f"those of {steps(owners)} never ({places.describe(never)})")
    return ": " + (", ".join(parts) if parts else "each window once, but not in its place")
