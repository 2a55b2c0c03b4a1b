"""What the receiving processes tell each other: numbers in memory that they share, each written by one of them.

Made before the first fork. A number survives its process: a worker that takes a dead one's place counts as ended what
the dead one had.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING

from gateway.access import REJECTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MALFORMED, NO_TLS = "malformed-request", "tls"
CHECKS = (*(one.check for one in REJECTIONS), MALFORMED, NO_TLS)

_CHECKS_AT = 8
_DRAINING, _PENDING, _SAID_BYTES = 0, 1, 2
_WORKERS_AT = _CHECKS_AT + 24
_HANDED, _ENDED, _TAKEN, _HELD, _STORED, _REFUSED, _BYTES, _RESTARTS, _READY, _SECURED, _OPENED = range(11)
_NUMBERS = 11
_TEXT_BYTES = 512
_ALONE_S = 1.0
PEER_NUMBERS = ("associations", "stored", "refused", "bytes")
_PEER_NUMBERS = len(PEER_NUMBERS)
_MOST_PEERS = 1000
OTHERS = "(others)"
"""Stands for every AE title that no list has."""
MOST_WORKERS = 16


class Board:
    """The shared numbers of a guard and some workers; those of `peers` are kept for each, others together."""

    def __init__(self, workers: int, peers: Sequence[str] = ()) -> None:
        self.workers = workers
        self._peers = {title: index for index, title in enumerate(dict.fromkeys((OTHERS, *peers[:_MOST_PEERS])))}
        peers_at = _WORKERS_AT + MOST_WORKERS * _NUMBERS
        each = len(self._peers) * _PEER_NUMBERS
        numbers = peers_at + workers * each
        self._decision = os.memfd_create("clarion-admitting")
        self._deciding = threading.Lock()
        self._timer = threading.Event()
        self._map = mmap.mmap(-1, numbers * 8 + _TEXT_BYTES)
        view = memoryview(self._map)
        self._numbers = view[: numbers * 8].cast("q")
        self._text = view[numbers * 8 :]
        self.slots = tuple(
            Slot(self._numbers, _WORKERS_AT + one * _NUMBERS, Peers(self._numbers, peers_at + one * each, self._peers))
            for one in range(workers)
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let nobody else in, whichever process it is, while it is decided in the block whether somebody is.

        Whoever dies in it lets go of it; who does not let go within a second is not waited for.
        """
        end = time.monotonic() + _ALONE_S
        held = self._deciding.acquire(timeout=_ALONE_S)
        try:
            while True:
                try:
                    fcntl.lockf(self._decision, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > end:
                        break
                    self._timer.wait(0.001)
            yield
        finally:
            if held:
                fcntl.lockf(self._decision, fcntl.LOCK_UN)
                self._deciding.release()

    def slot(self, worker: int) -> Slot:
        """Give the numbers of one worker."""
        return self.slots[worker]

    @property
    def draining(self) -> bool:
        """Whether no new association is accepted any more."""
        return bool(self._numbers[_DRAINING])

    @draining.setter
    def draining(self, value: bool) -> None:
        self._numbers[_DRAINING] = int(value)

    @property
    def pending(self) -> int:
        """How many connections the guard holds: silent, half asked, or being turned away."""
        return self._numbers[_PENDING]

    @pending.setter
    def pending(self, count: int) -> None:
        self._numbers[_PENDING] = count

    @property
    def associations(self) -> int:
        """How many associations are open."""
        return sum(max(0, one.open - one.opening) for one in self.slots)

    @property
    def peers(self) -> dict[str, dict[str, int]]:
        """What each calling AE title did, summed over the workers; those who did something."""
        counted: dict[str, dict[str, int]] = {}
        for title in self._peers:
            numbers = [slot.peers.of(title) for slot in self.slots]
            if any(map(any, numbers)):
                counted[title] = dict(zip(PEER_NUMBERS, map(sum, zip(*numbers, strict=True)), strict=True))
        return counted

    @property
    def refusals(self) -> dict[str, int]:
        """How many associations were rejected, by the check that failed."""
        counts = {check: self._numbers[_CHECKS_AT + index] for index, check in enumerate(CHECKS)}
        return {check: count for check, count in counts.items() if count}

    @property
    def last_refusal(self) -> str:
        """Who was rejected last, and why."""
        return bytes(self._text[: self._numbers[_SAID_BYTES]]).decode("utf-8", "replace")

    def refused(self, check: str, said: str) -> None:
        """Count a rejection."""
        self._numbers[_CHECKS_AT + CHECKS.index(check)] += 1
        raw = said.encode()[:_TEXT_BYTES]
        self._text[: len(raw)] = raw
        self._numbers[_SAID_BYTES] = len(raw)


class Slot:
    """The numbers of one worker. The guard writes what was handed, the worker all others; `lose` is the parent's.

    The threads of a process count through one Slot.
    """

    def __init__(self, numbers: memoryview[int], at: int, peers: Peers) -> None:
        self._numbers = numbers
        self._at = at
        self.peers = peers
        self._lock = threading.Lock()

    def _get(self, which: int) -> int:
        return self._numbers[self._at + which]

    def _add(self, which: int, count: int) -> None:
        with self._lock:
            self._numbers[self._at + which] += count

    @property
    def open(self) -> int:
        """How many associations were handed over and have not ended."""
        return max(0, self._get(_HANDED) - self._get(_ENDED))

    @property
    def handed(self) -> int:
        """How many connections the guard has given to it, in all."""
        return self._get(_HANDED)

    def hand(self) -> None:
        """Count a connection that was given to it."""
        self._add(_HANDED, 1)

    @property
    def secured(self) -> int:
        """How many of them speak TLS."""
        return self._get(_SECURED)

    @property
    def opening(self) -> int:
        """How many connections of those handed over still have to show, under TLS, who they are."""
        return max(0, self._get(_SECURED) - self._get(_OPENED))

    def hand_secured(self) -> None:
        """Count a connection under TLS that was given to it."""
        self._add(_SECURED, 1)

    def opened(self) -> None:
        """Count a connection under TLS that has asked for its association, or never will."""
        self._add(_OPENED, 1)

    def end(self) -> None:
        """Count an association that has ended."""
        self._add(_ENDED, 1)

    def begin_anew(self, *, ended: int, opened: int) -> None:
        """A worker takes the place: so many were handed to the one before and have ended, and nothing is held."""
        self._numbers[self._at + _ENDED] = ended
        self._numbers[self._at + _OPENED] = opened
        self._numbers[self._at + _TAKEN] = self._numbers[self._at + _HELD] = 0
        self._numbers[self._at + _READY] = 1

    @property
    def ready(self) -> bool:
        """Whether a process has taken the place and has not ended."""
        return bool(self._get(_READY))

    @property
    def taken(self) -> int:
        """How many associations the present process has had."""
        return self._get(_TAKEN)

    def take(self) -> None:
        """Count an association that begins."""
        self._add(_TAKEN, 1)

    @property
    def restarts(self) -> int:
        """How often a process had to be replaced."""
        return self._get(_RESTARTS)

    def lose(self) -> None:
        """Note that the process has ended, and will be replaced."""
        self._numbers[self._at + _READY] = 0
        self._add(_RESTARTS, 1)

    @property
    def held(self) -> int:
        """How many bytes of data sets it has in memory."""
        return self._get(_HELD)

    def hold(self, count: int) -> None:
        """Count bytes in memory; fewer if negative."""
        self._add(_HELD, count)

    def answered(self, size: int, *, success: bool) -> None:
        """Count an instance that was answered."""
        at = self._at
        with self._lock:
            self._numbers[at + (_STORED if success else _REFUSED)] += 1
            self._numbers[at + _BYTES] += size

    @property
    def counts(self) -> tuple[int, int, int]:
        """Instances answered with success, instances refused, bytes of both."""
        return self._get(_STORED), self._get(_REFUSED), self._get(_BYTES)


class Peers:
    """What each calling AE title did with one worker; its threads count at the end of an association, and seldom."""

    def __init__(self, numbers: memoryview[int], at: int, titles: Mapping[str, int]) -> None:
        self._numbers = numbers
        self._at = at
        self._titles = titles
        self._lock = threading.Lock()

    def add(self, title: str, counts: Sequence[int]) -> None:
        """Add to the numbers of a calling AE title, in the order of PEER_NUMBERS."""
        at = self._at_of(title)
        with self._lock:
            for index, count in enumerate(counts):
                self._numbers[at + index] += count

    def of(self, title: str) -> tuple[int, ...]:
        """Give the numbers of a calling AE title."""
        at = self._at_of(title)
        return tuple(self._numbers[at : at + _PEER_NUMBERS])

    def _at_of(self, title: str) -> int:
        return self._at + self._titles.get(title, self._titles[OTHERS]) * _PEER_NUMBERS


class HeldByAll:
    """The bytes being received by all workers, of which we are one."""

    def __init__(self, board: Board, slot: Slot) -> None:
        self._board = board
        self._slot = slot

    def add(self, count: int) -> None:
        """Count some of ours more; fewer if negative."""
        self._slot.hold(count)

    def total(self) -> int:
        """Give those of everybody."""
        return sum(one.held for one in self._board.slots)
