"""A process that ends with the one that started it, so that a crash leaves no orphan."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent ends; leave at once if `parent` has already gone.

    The parent is the thread that started us, so it must be one that lives as long as its process.
    """
    if not parent:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != int(parent):
        sys.exit(2)
