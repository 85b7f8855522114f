"""Free lists for pages and state slots."""


class OutOfMemory(RuntimeError):
    """A pool has fewer free units than were asked for; nothing was taken."""


class Allocator:
    """Hands out the units 0 to size - 1 of a pool, lowest first after a start or a full release.

    Args:
        size: units in the pool.
        unit: what a unit is called in errors ("page", "state slot").
    """

    def __init__(self, size: int, unit: str) -> None:
        self.size = size
        self.unit = unit
        self._free = list(range(size - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Units that `allocate` can still hand out."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take units.

        Raises:
            OutOfMemory: fewer than `count` are free. None is taken.
        """
        if count > len(self._free):
            raise OutOfMemory(
                f"{count} {self.unit}s asked for, {len(self._free)} of {self.size} are free"
            )
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def free(self, units: list[int]) -> None:
        """Give units back.

        Raises:
            ValueError: a unit is not in use: freed twice, or never handed out.
        """
        for unit in units:
            if unit not in self._used:
                raise ValueError(f"{self.unit} {unit} is not in use, so it cannot be freed")
            self._used.remove(unit)
            self._free.append(unit)
