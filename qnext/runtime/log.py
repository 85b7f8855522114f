"""Messages to people: one line each on stderr, with the level and, in a group, the rank."""

import logging
import sys
from typing import TextIO

ROOT_NAME = "qnext"
_seen_once: set[str] = set()


class _Formatter(logging.Formatter):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.prefix = "" if rank is None else f"[rank {rank}] "

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.prefix}{level}{record.getMessage()}"


def get_logger(name: str) -> logging.Logger:
    """Logger of a module, by its `__name__`; silent below WARNING until `setup_logging`."""
    return logging.getLogger(name if name.startswith(ROOT_NAME) else f"{ROOT_NAME}.{name}")


def setup_logging(
    level: int = logging.INFO, *, rank: int | None = None, stream: TextIO | None = None
) -> None:
    """Send qnext's messages to `stream` (stderr when None), replacing what an earlier call set.

    Args:
        level: lowest level shown; ranks other than 0 show warnings and worse whatever it is.
        rank: place in a group of processes, printed before each line; None for a lone process.
        stream: where to write; standard output stays free for results.
    """
    logger = logging.getLogger(ROOT_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(rank))
    logger.addHandler(handler)
    logger.setLevel(max(level, logging.WARNING) if rank else level)
    logger.propagate = False


def log_once(logger: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Log `message` the first time this process meets it; later calls with it do nothing."""
    if message not in _seen_once:
        _seen_once.add(message)
        logger.log(level, message)
