"""`clarion up`: every stage as a process, started together, started again when one ends, drained in order.

Order of the drain: receiving first, then what it feeds, the web page last. A stage that does not end within its
deadline is killed: nothing is lost by that, only later.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from clarion.adapters.database import Database
from clarion.errors import BusUnavailableError, ResourceBusyError
from clarion.processes import pause_after
from clarion.service import read_heartbeats
from console.app import lock
from console.schema import create_tables
from console.serve import DRAIN_S, SUPERVISED_BY
from console.stages import STAGES, stages_of

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType
    from typing import BinaryIO

    from console.checks import Checked

log = structlog.get_logger()

READY_S = 60.0
_LOOK_S = 0.2
_FIRST_PAUSE_S = 0.5


@dataclass(slots=True)
class _Child:
    stage: str
    process: subprocess.Popen[bytes]
    started: float
    pause_s: float = _FIRST_PAUSE_S
    restart_at: float | None = None


class Supervisor:
    """Keeps the stages running until told to stop. Its methods are for the thread that made it."""

    def __init__(self, checked: Checked, log_file: BinaryIO | None = None) -> None:
        self._config = checked.path
        self._log_file = log_file
        self._data: Path = checked.config.data
        self._stages = stages_of(checked.config)
        self._url = checked.config.database_url
        self._lock = lock(self._data, "clarion")
        self._stop = threading.Event()
        self._children: dict[str, _Child] = {}

    def start(self) -> None:
        """Start every stage and wait until each says that it runs. Raises ResourceBusyError when one refuses to.

        One that refuses to start says why in the log; one that was killed meanwhile is started again.
        """
        begun = time.time()
        for stage in self._stages:
            # What an older run said last is not how this one is.
            (self._data / "run" / f"{stage}.json").unlink(missing_ok=True)
        needed = self._stages if self._make_tables() else (STAGES[0],)
        for stage in self._stages:
            self._children[stage] = _Child(stage, self._spawn(stage), time.monotonic())
        end = time.monotonic() + READY_S
        while not self.ready(begun, needed):
            refused = [self._children[one] for one in needed if (self._children[one].process.poll() or 0) > 0]
            if refused or time.monotonic() > end:
                self.stop()
                names = ", ".join(one.stage for one in refused) or "not every stage"
                raise ResourceBusyError(f"{names} could not start; the log above says why")
            self.look()
            self._stop.wait(_LOOK_S)

    def _make_tables(self) -> bool:
        """Make what is not there yet; tell whether the database answers.

        Receiving needs the local disk alone: it is started without a database, and the other stages when that is back.
        """
        database = Database(self._url)
        try:
            create_tables(database)
        except BusUnavailableError as error:
            log.warning("database.away", reason=str(error), then="only receiving starts; the rest follows by itself")
            return False
        finally:
            database.close()
        return True

    def ready(self, since: float, stages: tuple[str, ...]) -> bool:
        """Tell whether some stages have all said since then that they run."""
        beats = {beat.stage: beat for beat in read_heartbeats(self._data / "run")}
        return all(stage in beats and beats[stage].alive and beats[stage].beat >= since for stage in stages)

    def watch(self) -> None:
        """Start again what ends, until a signal comes."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._signalled)
        while not self._stop.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Start again the stages that have ended and whose pause is over."""
        now = time.monotonic()
        for child in self._children.values():
            if child.process.poll() is None:
                continue
            if child.restart_at is None:
                child.pause_s = pause_after(child.pause_s, now - child.started, _FIRST_PAUSE_S)
                child.restart_at = now + child.pause_s
                log.error("stage.ended", stage=child.stage, status=child.process.returncode, again_in_s=child.pause_s)
            elif now >= child.restart_at:
                child.process, child.started, child.restart_at = self._spawn(child.stage), now, None

    def stop(self) -> None:
        """Drain the stages in order."""
        for stage in self._stages:
            child = self._children.get(stage)
            if child is None or child.process.poll() is not None:
                continue
            child.process.terminate()
            try:
                child.process.wait(DRAIN_S)
            except subprocess.TimeoutExpired:
                log.error("stage.killed", stage=stage, after_s=DRAIN_S)  # noqa: TRY400  no trace worth showing
                child.process.kill()
                child.process.wait(DRAIN_S)
        self._lock.close()

    def pid_of(self, stage: str) -> int:
        """Give a stage's process id."""
        return self._children[stage].process.pid

    def _spawn(self, stage: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603  our own module, no shell
            [sys.executable, "-P", "-m", "console.serve", stage, str(self._config)],
            env={**os.environ, SUPERVISED_BY: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stderr=self._log_file,
            # No session of its own: the kernel shares out processors by session, and nice values would say nothing.
            process_group=0,
        )

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._stop.set()
