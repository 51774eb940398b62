"""How far a benchmark is: a bar on standard error with the time that is left, and a line for every part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(parts: int) -> Iterator[Callable[[str], None]]:
    """Yields what to call with a line when one of the parts (loads, servers started) is done."""
    with tqdm(total=parts, unit="part", dynamic_ncols=True) as bar:

        def done(line: str) -> None:
            bar.write(line)
            sys.stdout.flush()
            bar.update()

        yield done
