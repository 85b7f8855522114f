"""Time for a run, shared among what is still to be measured."""

import time
from collections.abc import Callable


class Budget:
    """Seconds for a number of pieces; what one leaves over goes to those after it.

    Args:
        seconds: from now on.
        num_pieces: calls of `next_seconds` that will follow.
    """

    def __init__(self, seconds: float, num_pieces: int) -> None:
        self._end = time.monotonic() + seconds
        self._num_left = num_pieces

    def next_seconds(self) -> float:
        """The share of the next piece; 0 when all time is spent."""
        left = max(0.0, self._end - time.monotonic())
        share = left / max(1, self._num_left)
        self._num_left -= 1
        return share


def repeated(run: Callable[[], float], repeats: int, seconds: float) -> tuple[float, ...]:
    """Values of run: one at least, and no further one that would end after `seconds`."""
    start = time.monotonic()
    values = [run()]
    while len(values) < repeats:
        spent = time.monotonic() - start
        if spent + spent / len(values) > seconds:
            break
        values.append(run())
    return tuple(values)
