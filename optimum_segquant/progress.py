"""Progress bars with the time left, where the work itself reports nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

__all__ = ["written_bytes"]

_INTERVAL = 0.2  # seconds between two looks at the directory


@contextmanager
def written_bytes(directory: Path, expected: int, *, progress: bool = True) -> Iterator[None]:
    """Show how much of what is going to be written to ``directory`` is there, while the block writes it.

    Args:
        directory: where to; files of staged directories beside it, which begin with its name, count.
        expected: bytes, about.
        progress: show the bar.
    """
    if not progress:
        yield
        return
    stop = threading.Event()
    bar = tqdm(total=expected, desc="Writing", unit="B", unit_scale=True, unit_divisor=1024)

    def look() -> None:
        places = [directory, *directory.parent.glob(f".{directory.name}.*.partial")]
        size = sum(_size(file) for place in places for file in place.rglob("*"))
        bar.update(min(size, expected) - bar.n)

    def watch() -> None:
        while not stop.wait(_INTERVAL):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
        bar.close()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:  # moved away while we looked
        return 0
