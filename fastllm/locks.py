"""Locks on files, also where there are none: some network and user-space file systems refuse them."""

from __future__ import annotations

import errno
import os
import warnings
from typing import IO


def lock(file: IO, *, wait: bool = False, inherited: bool = False) -> bool:
    """Take the lock on ``file``; returns False if another process has it.

    Where the file system, or the operating system, has no locks, it returns True and warns.

    Args:
        file: open for writing; closing it gives the lock back, and so does the end of the process.
        wait: until another process has given it back.
        inherited: a child process shares it.
    """
    if os.name != "posix":
        return True
    import fcntl

    take = fcntl.flock if inherited else fcntl.lockf
    try:
        take(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        warnings.warn(
            f"{file.name}: this file system has no locks ({error.strerror}); let no two processes write there at once",
            RuntimeWarning,
            stacklevel=3,
        )
    return True
