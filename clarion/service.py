"""A stage's process: signals, an ordered drain, a heartbeat that others can read.

A stage is stepped by one thread. SIGTERM and SIGINT only set a flag; the step in progress ends, `drain` finishes or
hands back what is in hand, and the process leaves. A second signal leaves at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from clarion.adapters.files import write_whole
from clarion.adapters.wakeup import Wakeup
from clarion.errors import TransientError, describe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import FrameType

log = structlog.get_logger()

_HEARTBEAT_S = 2.0
_LOOK_S = 1.0
# A step may wait for the database as long as that waits for its lock; a process that ended is seen at once.
STALE_AFTER_S = 45.0


class Stage(Protocol):
    """What a process does, one bounded step at a time."""

    def step(self) -> bool:
        """Do a bounded piece of work; tell whether there may be more at once."""

    def facts(self) -> Mapping[str, object]:
        """Say what is worth showing in the status: ports, counts. No patient data."""

    def drain(self) -> None:
        """Finish or hand back what is in hand, within the stage's own deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a stage last said of itself; `trouble` is why its last step failed, empty when it did not."""

    stage: str
    pid: int
    started: float
    beat: float
    state: str
    facts: Mapping[str, object] = field(default_factory=dict)
    trouble: str = ""
    trouble_since: float = 0.0

    @property
    def alive(self) -> bool:
        """Tell whether the process is there and has said so lately."""
        return self.state != "stopped" and time.time() - self.beat < STALE_AFTER_S and _exists(self.pid)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Read what every stage last said."""
    beats = []
    for path in sorted(folder.glob("*.json")):
        try:
            beats.append(Heartbeat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            log.warning("heartbeat.unreadable", stage=path.stem)
    return beats


class Service:
    """Runs a stage until it is told to stop. `data` is the data folder; `wakeup` is the stage's doorbell."""

    def __init__(self, name: str, data: Path, wakeup: Wakeup) -> None:
        self._name = name
        self._folder = data / "run"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._wakeup = wakeup
        self._started = time.time()
        self._beat_due = 0.0
        self._stopping = False
        self._trouble, self._trouble_since = "", 0.0

    def run(self, stage: Stage) -> None:
        """Step the stage until a signal comes, then drain it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        log.info("stage.started", stage=self._name)
        while not self._stopping:
            self._beat("running", stage)
            if not self._step(stage):
                self._wakeup.wait(_LOOK_S)
        log.info("stage.draining", stage=self._name)
        self._beat_due = 0.0
        self._beat("draining", stage)
        stage.drain()
        self._beat_due = 0.0
        self._beat("stopped", stage)
        log.info("stage.stopped", stage=self._name)

    def _step(self, stage: Stage) -> bool:
        try:
            moved = stage.step()
        except TransientError as error:
            log.warning("stage.waiting", stage=self._name, error=type(error).__name__, reason=str(error))
            self._note_trouble(str(error))
            return False
        except Exception as error:
            # The one catch-all of this process: what a step could not bear is seen in the log and tried again.
            log.exception("stage.failed", stage=self._name)
            self._note_trouble(describe(error))
            return False
        self._note_trouble("")
        return moved

    def _note_trouble(self, trouble: str) -> None:
        """Remember why the step failed, and since when; the next heartbeat says it."""
        if bool(trouble) != bool(self._trouble):
            self._trouble_since = time.time() if trouble else 0.0
            self._beat_due = 0.0
        self._trouble = trouble

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopping:
            sys.exit(1)
        self._stopping = True
        self._wakeup.ring()

    def _beat(self, state: str, stage: Stage) -> None:
        if time.monotonic() < self._beat_due:
            return
        self._beat_due = time.monotonic() + _HEARTBEAT_S
        beat = Heartbeat(
            stage=self._name,
            pid=os.getpid(),
            started=self._started,
            beat=time.time(),
            state=state,
            facts=dict(stage.facts()),
            trouble=self._trouble,
            trouble_since=self._trouble_since,
        )
        try:
            write_whole(self._folder / f"{self._name}.json", json.dumps(asdict(beat)).encode())
        except OSError as error:
            log.warning("heartbeat.unwritable", stage=self._name, reason=error.strerror)


def open_wakeup(data: Path, name: str) -> Wakeup:
    """Hang a process's doorbell under the data folder."""
    return Wakeup(data / "wake", name)
