"""How many clients should run side by side: found by running some rounds with each of a few numbers."""

from collections.abc import Callable

LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# A step up the ladder has to gain more than what two runs of the same program differ by.
_GAIN = 0.95


def climb(measure: Callable[[int], float], start: int, most: int) -> dict[int, float]:
    """Seconds by number of lanes: up the ladder from ``start`` while it helps; down where it does not help at once.

    Each number costs a compilation, so neighbours of a loss are not tried.

    Args:
        measure: Seconds of a round with so many lanes.
        start: Where to begin.
        most: The largest number to try.

    Example:
        >>> climb(lambda lanes: abs(lanes - 5) + 1.0, start=10, most=40)
        {10: 6.0, 20: 16.0, 5: 1.0, 2: 4.0}
    """
    steps = sorted({start} | {lanes for lanes in LADDER if lanes <= most})
    place, seconds = steps.index(start), {start: measure(start)}

    def walk(ahead: list[int]) -> None:
        best = seconds[start]
        for lanes in ahead:
            seconds[lanes] = measure(lanes)
            if seconds[lanes] > _GAIN * best:
                return
            best = seconds[lanes]

    walk(steps[place + 1 :])
    if best_of(seconds) == start:
        walk(steps[:place][::-1])
    return seconds


def best_of(seconds: dict[int, float]) -> int:
    """The fastest number of lanes.

    >>> best_of({1: 0.2, 10: 0.1})
    10
    """
    return min(seconds, key=seconds.__getitem__)
