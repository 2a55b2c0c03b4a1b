"""The receiving process: it forks a guard and workers, watches them, and says how they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.adapters.files import free_bytes
from clarion.adapters.objects import FileStore
from console.stages import STOW
from gateway.access import AccessList
from gateway.admitting import Admitting
from gateway.association import Shared
from gateway.association_log import LOST, AssociationLog
from gateway.board import Board, HeldByAll
from gateway.doorbell import Doorbell
from gateway.guard import Guard
from gateway.intake import Intake
from gateway.journal import logs
from gateway.journal_writer import JournalWriter, settle
from gateway.preparing import Preparer
from gateway.receiver import STALL_S, Channels, Receiver, channels, listen, worker_count
from gateway.space import Space
from gateway.wire.secure import Renewed, acceptor_context, expires
from gateway.wire.stream import Deadlines
from gateway.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Protocol

    from clarion.config import GatewayConfig
    from clarion.ports import Clock
    from gateway.receiver import Runnable

    class Receiving(Protocol):
        """The guard and the workers, however they run."""

        @property
        def pids(self) -> dict[str, int]:
            """The processes that run now, by name."""

        def look(self) -> None:
            """Replace what has ended."""

        def drain(self, deadline_s: float) -> None:
            """Turn away who comes, let associations end until the deadline."""

    class Receive(Protocol):
        """Starts them."""

        def __call__(
            self,
            board: Board,
            make_guard: Callable[[], Runnable],
            make_worker: Callable[[int], Runnable],
            lost: Callable[[int, int], None],
            /,
        ) -> Receiving:
            """Start the guard and the workers; be told by `lost` of a worker that ended with its associations."""


_DRAIN_S = 15.0


class IntakeStage:
    """Receiving: its work is done by processes of its own, a step only watches them."""

    def __init__(
        self,
        config: GatewayConfig,
        data: Path,
        clock: Clock,
        receive: Receive = Receiver,
        measure: Callable[[Path], tuple[int, int]] = free_bytes,
    ) -> None:
        self._measure = measure
        self._config = config
        self._data = data
        self._clock = clock
        self._store = FileStore(data / "objects")
        self._store.clear_incoming()
        self._space = Space(data, config.intake, measure)
        titles = [one.ae_title for one in config.sources]
        titles += [one.ae_title for one in config.destinations if one.ae_title is not None]
        self.board = Board(worker_count(config.scp), titles)
        self._written = AssociationLog(data)
        self._settle_logs()
        self._listener = listen(config.scp.host, config.scp.port)
        self._tls = config.scp.tls
        self._secure = listen(self._tls.host, self._tls.port) if self._tls is not None else None
        self._channels: Channels = channels(self.board.workers)
        self.receiver = receive(self.board, self._make_guard, self._make_worker, self._note_lost)

    def _settle_logs(self) -> None:
        """There may have been more workers once: what their logs hold is read as well."""
        folder = self._data / "journal"
        ours = {f"w{index}" for index in range(self.board.workers)} | ({STOW} if self._config.stow else set())
        for name in set(logs(folder)) - ours:
            settle(folder / name, self._clock)

    def _note_lost(self, worker: int, count: int) -> None:
        """Write down that associations ended with their worker; which ones only their peers know."""
        if count:
            self._written.write(LOST, associations=count, reason=f"worker {worker} has ended")

    def step(self) -> bool:
        """Replace a process that has ended; associations are not our work."""
        self.receiver.look()
        return False

    def facts(self) -> dict[str, object]:
        """Say the port, the associations, what was received, and whether there is room."""
        slots = [one.counts for one in self.board.slots]
        return {
            "port": self._config.scp.port,
            "certificate_until": self._certificate_until(),
            "tls_port": self._tls.port if self._tls is not None else None,
            "associations": self.board.associations,
            "refusals": self.board.refusals,
            "last_refusal": self.board.last_refusal,
            "stored": sum(one[0] for one in slots),
            "refused": sum(one[1] for one in slots),
            "bytes": sum(one[2] for one in slots),
            "processes": self.receiver.pids,
            "peers": self.board.peers,
            "replaced_workers": sum(one.restarts for one in self.board.slots),
            "space": "ok" if self._space.available() else "low",
        }

    def _certificate_until(self) -> str | None:
        until = expires(self._tls.certificate) if self._tls is not None else None
        return until.isoformat() if until is not None else None

    def drain(self) -> None:
        """Accept no more, let associations end, close the journal."""
        self.receiver.drain(_DRAIN_S)
        self._listener.close()
        if self._secure is not None:
            self._secure.close()

    def _make_guard(self) -> Guard:
        return Guard(
            self._listener,
            self._channels.guard,
            config=self._config.scp,
            admitting=self._admitting(Space(self._data, self._config.intake, self._measure)),
            board=self.board,
            stall_s=STALL_S,
            written=AssociationLog(self._data),
            secure=self._secure,
        )

    def _admitting(self, space: Space) -> Admitting:
        return Admitting(config=self._config.scp, access=AccessList(self._config), space=space, board=self.board)

    def _make_worker(self, index: int) -> _JournallingWorker:
        slot = self.board.slot(index)
        space = Space(self._data, self._config.intake, self._measure, held=HeldByAll(self.board, slot))
        doorbell = Doorbell(self._data / "journal", self._data / "wake")
        journal = JournalWriter(self._data / "journal" / f"w{index}", self._clock, on_commit=doorbell.ring)
        intake = Intake(
            store=self._store,
            journal=journal,
            space=space,
            ignored_classes={one.ae_title: frozenset(one.ignored_sop_classes) for one in self._config.ae_titles},
        )
        worker = Worker(
            self._channels.worker[index],
            Shared(
                config=self._config.scp,
                intake=intake,
                slot=slot,
                deadlines=Deadlines(stall_s=STALL_S, idle_s=self._config.scp.idle_timeout_s),
                written=AssociationLog(self._data),
            ),
            drain_s=_DRAIN_S,
            admitting=self._admitting(space),
            tls=Renewed(self._tls.files, acceptor_context) if self._tls is not None else None,
        )
        return _JournallingWorker(worker, journal, space)


class _JournallingWorker:
    """A worker that has its log prepared while it is idle, and closes it when it ends."""

    def __init__(self, worker: Worker, journal: JournalWriter, space: Space) -> None:
        self._worker = worker
        self._journal = journal
        self._space = space

    def run(self) -> None:
        """Run the worker to its end."""
        preparer = Preparer(self._journal, self._space.available)
        try:
            self._worker.run()
        finally:
            preparer.stop()
            self._journal.close()

    def stop(self) -> None:
        """Make `run` return."""
        self._worker.stop()
