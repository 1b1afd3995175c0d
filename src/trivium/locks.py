"""Who may work in a folder: the lock of a file, which ends with the process that holds it, however that ends.

It is one of POSIX's (lockf): it counts on all machines that share a file system, and a worker that was forked does not
inherit it. One of flock's would be held until the last worker of a killed process has noticed, seconds later.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_mine: set[Path] = set()


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock of this file, until the block ends; blocks inside may ask for it again.

    Where the file system knows no locks, or the file cannot be opened, it is as if nobody else were there.

    Args:
        path: a file for nothing else; it is made where it is not there, and stays.
        wait: until the one that holds it lets go.
    """
    path = path.absolute()
    if path in _mine:  # to open and close the file once more would end the lock
        yield True
        return
    alone = True
    with ExitStack() as taken:
        try:
            file = taken.enter_context(path.open("a"))
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:
            pass
        if alone:
            _mine.add(path)
            taken.callback(_mine.discard, path)
        yield alone
