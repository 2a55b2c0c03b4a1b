"""Receiving as a whole: a port, a guard, workers, each a process of its own; forked, watched, replaced, drained.

A worker that dies costs only its associations, a guard only those who have not been let in: the port stays open
meanwhile, for this process holds it too. Forking comes before any thread: this process has none.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from clarion import crashpoints
from clarion.errors import ResourceBusyError
from clarion.processes import end_with_parent, pause_after, raise_file_limit
from gateway.guard import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Callable

    from clarion.config import ScpConfig
    from gateway.board import Board

log = structlog.get_logger()

STALL_S = 30.0
"""A connection must ask for an association by then, and a PDU that has begun must be whole."""
_FIRST_PAUSE_S = 0.2
_MARGIN_S = 5.0


class Runnable(Protocol):
    """A guard or a worker, made in its own process."""

    def run(self) -> None:
        """Run until stopped."""

    def stop(self) -> None:
        """Make `run` return."""


def listen(host: str, port: int) -> socket.socket:
    """Open a port. Raises ResourceBusyError."""
    try:
        return socket.create_server((host, port), backlog=BACKLOG)
    except OSError as error:
        raise ResourceBusyError(
            f"gateway.scp: cannot listen on {host}:{port}: {error.strerror}; is the port taken by "
            "another program, or below 1024 without permission?"
        ) from error


def worker_count(config: ScpConfig) -> int:
    """Give how many workers there are: as configured, else one for every core, four at most."""
    return config.workers or min(4, os.cpu_count() or 1)


@dataclass(slots=True)
class Channels:
    """The two ends of the way from the guard to each worker. This process keeps both: nothing in it is ever lost."""

    guard: list[socket.socket]
    worker: list[socket.socket]


def channels(count: int) -> Channels:
    """Open the ways from the guard to the workers."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    return Channels([one for one, _ in pairs], [other for _, other in pairs])


@dataclass(slots=True)
class _Child:
    name: str
    make: Callable[[], Runnable]
    worker: int | None = None
    pid: int = 0
    started: float = 0.0
    pause_s: float = _FIRST_PAUSE_S
    restart_at: float = 0.0
    runs: int = 0


class Receiver:
    """The guard and the workers of one port. Its methods are for the thread that made it.

    `lost` is told when a worker has ended that had associations: which one, and how many.
    """

    def __init__(
        self,
        board: Board,
        make_guard: Callable[[], Runnable],
        make_worker: Callable[[int], Runnable],
        lost: Callable[[int, int], None] = lambda _worker, _count: None,
    ) -> None:
        self._lost = lost
        raise_file_limit()
        self.board = board
        self._children = [_Child("guard", make_guard)]
        self._children += [
            _Child(f"worker-{index}", partial(make_worker, index), worker=index) for index in range(board.workers)
        ]
        for child in self._children[::-1]:
            self._fork(child)

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run now, by name."""
        return {one.name: one.pid for one in self._children if one.pid}

    def look(self) -> None:
        """Replace what has ended, each with a pause that grows while it fails."""
        now = time.monotonic()
        for child in self._children:
            if child.pid and self._has_ended(child):
                child.pause_s = pause_after(child.pause_s, now - child.started, _FIRST_PAUSE_S)
                child.restart_at = now + child.pause_s
                if child.worker is not None:
                    self._lost(child.worker, self.board.slot(child.worker).open)
                    self.board.slot(child.worker).lose()
            if not child.pid and now >= child.restart_at:
                self._fork(child)

    def drain(self, deadline_s: float) -> None:
        """Turn away who comes, let associations end until the deadline, abort the rest."""
        self.board.draining = True
        guard, *workers = self._children
        self._end(workers, deadline_s + _MARGIN_S)
        self._end([guard], _MARGIN_S)

    def _end(self, children: list[_Child], deadline_s: float) -> None:
        for child in children:
            if child.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
        end = time.monotonic() + deadline_s
        while any(one.pid and not self._has_ended(one) for one in children):
            if time.monotonic() > end:
                for child in children:
                    if child.pid:
                        log.error("receiver.killed", child=child.name, after_s=deadline_s)
                        os.kill(child.pid, signal.SIGKILL)
                end = time.monotonic() + deadline_s
            time.sleep(0.01)

    def _has_ended(self, child: _Child) -> bool:
        done, status = os.waitpid(child.pid, os.WNOHANG)
        if not done:
            return False
        code = os.waitstatus_to_exitcode(status)
        (log.error if code else log.info)("receiver.ended", child=child.name, status=code)
        child.pid = 0
        return True

    def _fork(self, child: _Child) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run(child, parent)
        child.pid, child.started = pid, time.monotonic()
        child.runs += 1


def _run(child: _Child, parent: int) -> None:
    """Be the child: run it, then end without what the parent would have done."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(str(parent))
        if child.runs:
            crashpoints.arm(None)  # a process that was killed at a point is not killed there again
        running = child.make()
        signal.signal(signal.SIGTERM, lambda *_: running.stop())
        gc.collect()
        gc.freeze()
        running.run()
        status = 0
    except Exception:  # the process's own boundary: said, and replaced by the parent
        log.exception("receiver.failed", child=child.name)
    finally:
        sys.stderr.flush()
        os._exit(status)
