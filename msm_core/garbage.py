"""Python's collector of cyclic garbage, held back where a fleet's objects pile up."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

ALLOCATIONS = 500_000  # about ten thousand portfolios of fifty assets


@dataclass
class _Held:
    """The collector is the process's: the first to come holds it back, the last to go lets it be as it was."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    by: int = 0
    before: tuple[int, int, int] = (0, 0, 0)


_HELD = _Held()


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Also a decorator. Reading many specs allocates without end and frees nothing, so by default everything alive is looked through
    again and again: measured, half of the time of reading 1 000 portfolios, and more of each further thousand."""
    with _HELD.lock:
        if not _HELD.by:
            _HELD.before = gc.get_threshold()
            gc.set_threshold(ALLOCATIONS, *_HELD.before[1:])
        _HELD.by += 1
    try:
        yield
    finally:
        with _HELD.lock:
            _HELD.by -= 1
            if not _HELD.by:
                gc.set_threshold(*_HELD.before)
