"""A process that ends with the one that started it, so that a crash leaves no orphan."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_LONGEST_PAUSE_S = 30.0
_HEALTHY_S = 60.0


def pause_after(pause_s: float, ran_s: float, first_s: float) -> float:
    """Give the pause before a process that has ended is started again: longer each time, unless it ran for long."""
    return first_s if ran_s > _HEALTHY_S else min(pause_s * 2, _LONGEST_PAUSE_S)


def end_with_parent(parent: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent ends; leave at once if `parent` has already gone.

    The parent is the thread that started us, so it must be one that lives as long as its process.
    """
    if not parent:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != int(parent):
        sys.exit(2)


def raise_file_limit() -> None:
    """Have as many descriptors as we may: silent connections cost one each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
