"""Numbers as a reader wants them."""

from collections.abc import Iterable


def ranges(numbers: Iterable[int], limit: int = 8) -> str:
    """``1, 3 to 7 and 9``: sorted numbers, runs drawn together; at most ``limit`` parts."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(a) if a == b else f"{a}{' to ' if b > a + 1 else ', '}{b}" for a, b in parts]
    rest = sum(b - a + 1 for a, b in parts[limit:])
    return ", ".join(shown[:limit]) + (f" and {rest:,} more" if rest else "")


def steps(numbers: Iterable[int]) -> str:
    """``step 3``, or ``steps 3 to 5``."""
    numbers = list(numbers)
    return f"step{'s' if len(numbers) != 1 else ''} {ranges(numbers)}"
