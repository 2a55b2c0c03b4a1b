"""Operators as processes of this machine: own session, own environment, a deadline, a bounded log.

A process ends with the engine that started it (the runner asks the kernel for that), so no operator is left behind
by a crash; the ledger then starts a new attempt.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.crashpoints import effect
from clarion.errors import ResourceBusyError
from clarion.model import KILLED, LOST, WorkState

if TYPE_CHECKING:
    from clarion.model import OperatorWork

MAX_LOG_BYTES = 16 * 2**20
_GRACE_S = 5.0


@dataclass(slots=True)
class _Running:
    work: OperatorWork
    process: subprocess.Popen[bytes]
    deadline: float
    reason: str = ""


class LocalExecutor:
    """Runs operators as child processes. For one thread."""

    def __init__(self) -> None:
        self._known: dict[str, _Running] = {}

    def submit(self, work: OperatorWork) -> None:
        """Start the process; passed over when the work is known."""
        if work.work_id in self._known:
            return
        try:
            with effect("executor.submit"), open(work.log, "ab") as log:  # noqa: PTH123  a plain string path
                process = subprocess.Popen(  # noqa: S603  the command is ours, no shell
                    work.command,
                    cwd=work.folder,
                    env=dict(work.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ResourceBusyError(f"operator {work.operator!r} cannot be started: {error.strerror}") from error
        self._known[work.work_id] = _Running(work, process, time.monotonic() + work.timeout_s)

    def poll(self, work_id: str) -> WorkState:
        """Tell how the process stands; ends it when its time or its log is over the limit."""
        running = self._known.get(work_id)
        if running is None:
            return WorkState(exit_status=-1, reason=LOST)
        if running.process.poll() is None:
            self._limit(running)
        status = running.process.poll()
        if status is None:
            return WorkState(exit_status=None)
        _kill_session(running.process.pid)
        reason = running.reason
        if not reason and status < 0:
            reason = f"{KILLED} {-status}"
        return WorkState(exit_status=status, reason=reason)

    def cancel(self, work_id: str) -> None:
        """End the process and everything it started, and forget the work."""
        running = self._known.pop(work_id, None)
        if running is not None and running.process.poll() is None:
            _end(running)

    def _limit(self, running: _Running) -> None:
        if time.monotonic() > running.deadline:
            running.reason = f"time-limit of {running.work.timeout_s:.0f} s"
        elif os.path.getsize(running.work.log) > MAX_LOG_BYTES:  # noqa: PTH202  a plain string path
            running.reason = f"log-limit of {MAX_LOG_BYTES} bytes"
        if running.reason:
            _end(running)


def _end(running: _Running) -> None:
    _kill_session(running.process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.process.wait(_GRACE_S)


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
