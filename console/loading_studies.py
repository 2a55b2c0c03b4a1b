"""Sends studies over several associations at a rate, and keeps the sender's list of what was acknowledged.

The list is the independent judge of loss: a line for each acknowledged instance, SOP Instance UID and digest of the
data set, written before the next is sent on that association.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clarion.dicom import split_part10
from clarion.digests import digest_of
from clarion.errors import InvalidInstanceError, PeerRefusedError, PeerUnavailableError, UnreadableSeriesError
from clarion.renaming import rename
from console.sending import look_through
from gateway.proposals import MOST_CLASSES
from gateway.scu import Requestor, Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clarion.model import Destination
    from console.sending import File

_TIMEOUTS = Timeouts(connect_s=10, dimse_s=60)
_SUCCESS = 0
# So often an association is made anew when one is lost, before its part of the load is given up.
_TRIES = 3
_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to send: `passes` times, from the second on under new UIDs; `rate` in instances per second over all."""

    associations: int = 1
    passes: int = 1
    rate: float | None = None
    duplicate: bool = False
    reorder: bool = False
    seed: int | None = None


@dataclass(slots=True)
class Outcome:
    """What came of it. Latencies in seconds, from the first byte of an instance to its response."""

    planned: int = 0
    acknowledged: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    size_bytes: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    trouble: str = ""
    refused_for_good: bool = False

    @property
    def pending(self) -> int:
        """How many were not sent, or got no answer."""
        return self.planned - self.acknowledged - self.refused.total()


class StudyLoad:
    """One load. `run` it once; `stop` may be called by any thread, and by a signal handler."""

    def __init__(
        self,
        folder: Path,
        peer: Destination,
        order: Order,
        *,
        own_ae: str,
        acknowledged: Callable[[str, str], None],
        progress: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        files, found = look_through(folder)
        self._peer = peer
        self._order = order
        self._own_ae = own_ae
        self._acknowledged = acknowledged
        self._progress = progress
        self._classes = {(one.sop_class, one.syntax) for one in files}
        if len(self._classes) > MOST_CLASSES:
            raise UnreadableSeriesError(
                "too-many-kinds", f"in {folder} are more than {MOST_CLASSES} SOP classes and syntaxes; load a part"
            )
        self._queue = _queue(files, order)
        self._next = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._begun = 0.0
        self._salt = f"load/{order.seed if order.seed is not None else time.time_ns()}"
        self.outcome = Outcome(planned=len(self._queue), skipped=found.skipped)

    def run(self) -> Outcome:
        """Send everything, or as much as can be; a peer that cannot be reached ends it, with the reason."""
        self._begun = time.monotonic()
        threads = [
            threading.Thread(target=self._associate, name=f"load-{index}", daemon=True)
            for index in range(self._order.associations)
        ]
        for one in threads:
            one.start()
        try:
            for one in threads:
                one.join()
        except KeyboardInterrupt:
            self.stop()
            for one in threads:
                one.join(_TIMEOUTS.dimse_s)
            raise
        finally:
            self.outcome.seconds = time.monotonic() - self._begun
        return self.outcome

    def stop(self) -> None:
        """Send nothing more."""
        self._stopped.set()

    def _associate(self) -> None:
        """Send on one association; made anew when it is lost, a few times."""
        tries = 0
        while not self._stopped.is_set() and self._next < len(self._queue):
            try:
                with Requestor(self._peer, own_ae=self._own_ae, classes=self._classes, timeouts=_TIMEOUTS) as requestor:
                    while (item := self._take()) is not None:
                        self._send(requestor, *item)
                        tries = 0
            except Exception as error:  # noqa: BLE001  a thread's end: said in the outcome
                tries += 1
                if not isinstance(error, PeerUnavailableError) or tries > _TRIES:
                    self.outcome.trouble = str(error)
                    self.outcome.refused_for_good = isinstance(error, PeerRefusedError)
                    return
                self._stopped.wait(_PAUSE_S)

    def _take(self) -> tuple[File, int] | None:
        """Take the next instance when its time has come; None when there is none, or we are stopped."""
        with self._lock:
            if self._next >= len(self._queue):
                return None
            number, self._next = self._next, self._next + 1
        if self._order.rate is not None:
            self._stopped.wait(max(0.0, self._begun + number / self._order.rate - time.monotonic()))
        return None if self._stopped.is_set() else self._queue[number]

    def _send(self, requestor: Requestor, file: File, pass_: int) -> None:
        data, syntax = split_part10(file.path.read_bytes())
        instance = file.sop_instance
        if pass_:
            try:
                data, instance = rename(data, syntax, f"{self._salt}/{pass_}")
            except InvalidInstanceError as error:
                raise InvalidInstanceError(error.reason, f"{file.path.name} cannot be given new UIDs") from error
        begun = time.monotonic()
        status = requestor.store(data, sop_class=file.sop_class, sop_instance=instance, syntax=syntax)
        seconds = time.monotonic() - begun
        with self._lock:
            self.outcome.latencies.append(seconds)
            self.outcome.size_bytes += len(data)
            if status == _SUCCESS:
                self.outcome.acknowledged += 1
                self._acknowledged(instance, digest_of(data))
            else:
                self.outcome.refused[status] += 1
            self._progress(self.outcome)


def _queue(files: list[File], order: Order) -> list[tuple[File, int]]:
    """Put what is to be sent in order: each file and the number of its pass."""
    queue = [(one, pass_) for pass_ in range(order.passes) for one in files for _ in range(1 + order.duplicate)]
    if order.reorder:
        random.Random(order.seed).shuffle(queue)  # noqa: S311  an order, no secret
    return queue


def percentile(values: list[float], share: float) -> float:
    """Give the value that so large a share does not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
