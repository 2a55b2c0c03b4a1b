"""The real guard and workers as threads of the test's process: a crash point reached in them ends that process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from gateway.board import Board
from gateway.receiver import Runnable


def run_beside(work: Callable[[int], None], count: int) -> None:
    """Do something in so many threads at once, each with its number; all of them come to an end."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
        assert not one.is_alive()


class ReceiverThreads:
    """Runs what `Receiver` runs, without processes."""

    def __init__(
        self,
        board: Board,
        make_guard: Callable[[], Runnable],
        make_worker: Callable[[int], Runnable],
        *_: object,
    ) -> None:
        self.board = board
        self.guard = make_guard()
        self.workers = [make_worker(index) for index in range(board.workers)]
        self._threads = {
            one: threading.Thread(target=one.run, daemon=True, name=type(one).__name__)
            for one in (*self.workers, self.guard)
        }
        for thread in self._threads.values():
            thread.start()

    @property
    def pids(self) -> dict[str, int]:
        return {}

    def look(self) -> None:
        assert all(one.is_alive() for one in self._threads.values()), "a part of receiving has ended"

    def drain(self, deadline_s: float) -> None:
        self.board.draining = True
        for one in (*self.workers, self.guard):
            one.stop()
            self._threads[one].join(deadline_s + 5)
            assert not self._threads[one].is_alive()
