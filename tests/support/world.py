"""One small Clarion in one process, killed at chosen points and started again: what the crash tests run.

Three processes a case, all forked from a parent without threads: a PACS, a sender that keeps its own list of what was
acknowledged, and the system under test with real SCP, journal, store, database, pipeline, writers, gate and delivery.
Only time is manual and operators run in the process itself. The parent judges by the sender's list, the database,
the object store and what lies in the PACS.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from support.threads import ReceiverThreads

from clarion import crashpoints
from clarion.adapters.database import Database
from clarion.adapters.memory import ManualClock
from clarion.adapters.objects import FileStore
from clarion.adapters.outbox import consumers, dead_letters, events_table
from clarion.adapters.wakeup import Wakeup
from clarion.dicom import split_part10
from clarion.digests import digest_of
from clarion.errors import ClarionError
from clarion.model import Destination, ObjectRef
from clarion.testing.executor import InlineExecutor
from clarion.testing.pacs import Pacs, read_contents
from clarion.testing.phantom import PhantomSpec, make_phantom, write_phantom
from clarion.testing.ports import free_port
from console.app import App
from console.checks import check_config
from console.intake import IntakeStage
from gateway import tables
from gateway.scu import Requestor, Timeouts
from operators.runner import run as run_operator
from orchestrator.ledger import jobs
from streams.queries import read_story, state_of

BASE = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
TINY = PhantomSpec(slices=4, size=64, length_mm=160, seed=5)
RESULTS = 4
DEADLINE_S = 90.0


def make_series(folder: Path, spec: PhantomSpec = TINY, modality: str = "CT") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = write_phantom(make_phantom(spec), folder)
    if modality != "CT":
        from pydicom import dcmread

        for path in files:
            ds = dcmread(path)
            ds.Modality = modality
            ds.save_as(path)
    return files


def write_config(root: Path, *, scp: int, pacs: int, console: int = 0, **gateway: Any) -> Path:
    described = {
        "data": "data",
        "gateway": {
            "scp": {"port": scp},
            "ae_titles": [{"ae_title": "CHEST", "settings": {"pipeline-chest": "chest-ct"}}],
            "sources": [{"ae_title": "SENDER", "host": "127.0.0.1"}],
            "destinations": [{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs}],
            "intake": {"watermark_percent": 100, "reserve_gb": 0.5},
            "delivery": {"retry_delay_s": 2, "connect_timeout_s": 5, "dimse_timeout_s": 20},
            **gateway,
        },
        "pipelines": [{"id": "chest-ct", "file": "builtin:chest-ct", "destinations": ["pacs"]}],
        "console": {"port": console or free_port()},
        # Engines are killed more often here than a job would bear by default.
        "orchestrator": {"retry_budget": 10},
    }
    path = root / "clarion.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


@dataclass
class Case:
    """One crash: where, after how many passes, with which seed."""

    root: Path
    files: list[Path]
    point: str | None
    seed: int
    final: str = "Verified"
    runs: int = 0
    kills: int = 0
    passes: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        self.root.mkdir(parents=True)
        scp, pacs = free_port(), free_port()
        self.config = write_config(self.root, scp=scp, pacs=pacs)
        children = [fork(lambda: self._pacs(scp, pacs)), fork(lambda: self._send(scp))]
        try:
            end = time.monotonic() + DEADLINE_S
            while True:
                status = self._run_system(end)
                self.runs += 1
                if status == 0:
                    break
                assert status == -signal.SIGKILL, f"the system ended with {status}: {self.log()}"
                self.kills += 1
                assert self.kills < 3, f"killed again and again: {self.log()}"
        finally:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        counted = self.root / "passes.json"
        if counted.exists():
            self.passes = json.loads(counted.read_text())

    def log(self) -> str:
        return (self.root / "system.log").read_text()[-3000:]

    def _run_system(self, end: float) -> int:
        armed = self.point if self.kills == 0 else None
        pid = fork(lambda: self._system(armed), self.root / "system.log")
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"{self.point}: not finished after {DEADLINE_S} s: {self.log()}")
            pause(0.01)

    # In the children ----------------------------------------------------------------------------------------

    def _pacs(self, scp: int, port: int) -> None:
        Pacs(self.root / "pacs", ae_title="PACS", port=port, callers={"CLARION": ("127.0.0.1", scp)})
        signal.pause()

    def _send(self, port: int) -> None:
        """Send everything, in the seed's order, over several associations, some twice, until it is acknowledged."""
        rng = random.Random(self.seed)
        wanted = [*self.files, rng.choice(self.files)]
        rng.shuffle(wanted)
        peer = Destination(name="clarion", ae_title="CHEST", host="127.0.0.1", port=port)
        ledger = self.root / "acknowledged.txt"
        while wanted:
            try:
                self._send_some(wanted, peer, ledger, rng.randint(1, 3))
            except ClarionError:
                pause(0.02)
        (self.root / "sent").touch()

    def _send_some(self, wanted: list[Path], peer: Destination, ledger: Path, count: int) -> None:
        data, syntax = split_part10(wanted[0].read_bytes())
        ct = "1.2.840.10008.5.1.4.1.1.2"
        with Requestor(
            peer, own_ae="SENDER", classes=[(ct, syntax)], timeouts=Timeouts(connect_s=30, dimse_s=30)
        ) as scu:
            for _ in range(min(count, len(wanted))):
                data, syntax = split_part10(wanted[0].read_bytes())
                uid = uid_of(wanted[0])
                if scu.store(data, sop_class=ct, sop_instance=uid, syntax=syntax) != 0:
                    return
                with ledger.open("a") as file:
                    file.write(f"{uid} {digest_of(data)}\n")
                wanted.pop(0)

    def _system(self, armed: str | None) -> None:
        # Time stands still while the sender sends: a stop shorter than the quiet period splits no group. Once
        # everything is sent each start begins later than the one before ended.
        sent = (self.root / "sent").exists()
        clock = ManualClock(BASE + (timedelta(hours=2 * self.kills) if sent else timedelta(seconds=self.kills)))
        crashpoints.arm(armed or crashpoints.COUNT)
        checked = check_config(self.config)
        checked.config.data.mkdir(exist_ok=True)
        app = App(checked=checked, wakeup=Wakeup(checked.config.data / "wake", "system"), clock=clock)
        intake = IntakeStage(checked.config.gateway, app.data, clock, ReceiverThreads)
        stages = [app.grouping(), app.streams(), app.orchestrator(InlineExecutor(run_operator)), app.delivery()]
        while not self._finished(app.database):
            moved = [stage.step() for stage in stages]
            if not any(moved) and stages[3].idle():  # type: ignore[attr-defined]
                pause(0.01)
                if (self.root / "sent").exists():
                    clock.advance(timedelta(seconds=1))
        if armed is None:
            (self.root / "passes.json").write_text(json.dumps(crashpoints.passes))
        intake.drain()

    def _finished(self, database: Database) -> bool:
        if not (self.root / "sent").exists():
            return False
        studies = {uid for uid, _ in self.studies(database)}
        return bool(studies) and all(state_of(read_story(database, uid)) == self.final for uid in studies)

    def studies(self, database: Database) -> list[Any]:
        with database.reading() as connection:
            return list(connection.execute(sa.select(tables.studies.c.study_uid, tables.studies.c.sequence)))

    def judge(self) -> None:
        """I1 to I6, by the sender's own list."""
        acknowledged = {tuple(line.split()) for line in (self.root / "acknowledged.txt").read_text().splitlines()}
        assert len(acknowledged) == len(self.files), "the sender did not finish"
        judge(self.root, acknowledged, studies=1, final=self.final)


# Judgement -------------------------------------------------------------------------------------------------------


def judge(
    root: Path, acknowledged: set[tuple[str, ...]], *, studies: int, final: str = "Verified", url: str | None = None
) -> None:
    """I1 to I6: nothing lost, no event without instance, results once, order dense, nothing stuck.

    `acknowledged` is the sender's list of (SOP Instance UID, digest); what it was not told of may be there as well,
    when an answer was lost on its way.
    """
    database = Database(url or f"sqlite:///{root / 'data' / 'clarion.db'}")
    store = FileStore(root / "data" / "objects")
    with database.reading() as connection:
        _judge_instances(connection, store, acknowledged)
        _judge_events(connection)
        sent = _judge_ends(connection, studies, final)
    database.close()
    kept = [one.sop_instance_uid for one in read_contents(root / "pacs")]
    assert len(kept) == len(set(kept)), "I3: an output twice"
    wanted, given_up = sent
    assert wanted <= set(kept) <= wanted | given_up, f"I3: the PACS has {len(kept)} objects, {len(wanted)} were made"


def _judge_instances(connection: sa.Connection, store: FileStore, acknowledged: set[tuple[str, ...]]) -> None:
    rows = connection.execute(sa.select(tables.instances)).all()
    assert {(row.sop_instance_uid, row.digest) for row in rows} >= acknowledged, "I1: instances lost"
    for row in rows:
        assert digest_of(store.read(ObjectRef(**row.object))) == row.digest, "I1: bytes altered"
    members = connection.execute(sa.select(tables.members)).all()
    assert {row.sop_instance_uid for row in members} == {row.sop_instance_uid for row in rows}, "I1: not grouped"
    stored = connection.execute(sa.select(events_table.c.body).where(events_table.c.kind == "instance.stored.v1"))
    said = [json.loads(row.body)["sop_instance_uid"] for row in stored]
    assert sorted(said) == sorted(row.sop_instance_uid for row in rows), "I2: events and instances differ"


def _judge_events(connection: sa.Connection) -> None:
    sequences: dict[str, list[int]] = {}
    for row in connection.execute(sa.select(events_table).order_by(events_table.c.position)):
        sequences.setdefault(row.subject, []).append(json.loads(row.body)["sequence"])
    for subject, found in sequences.items():
        assert found == list(range(1, len(found) + 1)), f"I4: {subject} has {found}"
    assert not connection.execute(sa.select(dead_letters)).all(), "a dead letter"
    assert connection.execute(sa.select(sa.func.count()).select_from(consumers)).scalar_one() >= 4


def _judge_ends(connection: sa.Connection, studies: int, final: str) -> tuple[set[str], set[str]]:
    """Every study has one job that counts, groups are closed, deliveries at their end.

    Gives what was sent, and what belongs to deliveries that were given up, perhaps half sent, for a newer revision's.
    """
    rows = connection.execute(sa.select(jobs)).all()
    counted = [row for row in rows if row.state != "superseded"]
    assert {row.state for row in counted} == ({"succeeded"} if final == "Verified" else {"failed"}), f"I5: jobs {rows}"
    assert len(counted) == len({row.group_id for row in rows}) == studies, "I3: one job per group"
    assert {row.state for row in connection.execute(sa.select(tables.groups))} == {"closed"}, "I5: open group"
    deliveries = connection.execute(sa.select(tables.deliveries)).all()
    ends = {row.state for row in deliveries} - {"superseded"}
    assert ends == ({"verified"} if final == "Verified" else set()), f"I5: deliveries {ends}"
    items = tables.delivery_instances
    found: dict[str, set[str]] = {"verified": set(), "superseded": set()}
    for row in deliveries:
        here = sa.select(items.c.sop_instance_uid).where(items.c.delivery_id == row.delivery_id)
        uids = set(connection.execute(here).scalars())
        assert len(uids) == RESULTS
        found[row.state] |= uids
    return found["verified"], found["superseded"]


def uid_of(path: Path) -> str:
    from pydicom import dcmread

    return str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)


def pause(seconds: float) -> None:
    """Yield the processor between two looks at a condition that has a deadline."""
    import threading

    threading.Event().wait(seconds)


def until(condition: Callable[[], bool], what: str, deadline_s: float = 30) -> None:
    """Wait for a condition; fails naming what was waited for."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, what
        pause(0.02)


def fork(body: Any, log: Path | None = None) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if log is not None:
            handle = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
        sys.stdin.close()
        body()
        status = 0
    except BaseException:  # noqa: BLE001  the child of a test says what went wrong and ends
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
