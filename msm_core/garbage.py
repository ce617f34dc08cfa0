"""Python's collector of cyclic garbage, held back where a fleet's objects pile up."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATIONS = 500_000  # about ten thousand portfolios of fifty assets


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """Also a decorator. Reading many specs allocates without end and frees nothing, so by default everything alive is looked through
    again and again: measured, half of the time of reading 1 000 portfolios, and more of each further thousand."""
    before = gc.get_threshold()
    gc.set_threshold(ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
