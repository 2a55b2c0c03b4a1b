"""The engine and its ledger under trouble: no job runs on part of its payload, none is left behind, none comes back."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support.postgres import url_in
from support.world import fork

from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.memory import ManualClock, MemoryStore
from clarion.config import OrchestratorConfig
from clarion.errors import BusUnavailableError, StoreUnavailableError, TransientError
from clarion.events import JobRequested
from clarion.model import KILLED, Manifest, ManifestEntry, ObjectRef, SeriesUid, SopInstanceUid, StudyUid, WorkState
from clarion.testing.executor import InlineExecutor
from clarion.testing.suites import MOMENT
from orchestrator.engine import Engine
from orchestrator.ledger import Ledger, jobs
from orchestrator.payload import remove, seal
from orchestrator.requests import JobRequests

pytestmark = pytest.mark.usefixtures("each_database")

DEFINITION = b"""api-version: 0.7.0
name: p
operators:
- name: reader
  container: {image: 'operator:dicom-reader'}
  input: [{name: payload, path: /input}]
  output: [{name: volume, path: /output, type: stream, element-type: volume}]
"""
DATA = b"\x20\x00\x0d\x00UI\x04\x001.9\x00"


class Rig:
    def __init__(self, root: Path, run: Callable[[Mapping[str, str]], int] | None = None) -> None:
        self.root = root
        self.clock = ManualClock(MOMENT)
        self.store = MemoryStore()
        self.database = Database(url_in(root))
        self.ledger = Ledger(self.database, self.clock)
        self.seen: list[int] = []
        self.executor = InlineExecutor(run or self.operator)
        self.engine = self.make()

    def make(self) -> Engine:
        bus = EmbeddedBus(self.database, self.clock)
        bus.subscribe("ledger", [JobRequested], JobRequests(self.database))
        self.bus = bus
        return Engine(
            config=OrchestratorConfig(), bus=bus, ledger=self.ledger, executor=self.executor, store=self.store,
            work=self.root / "work", clock=self.clock,
        )  # fmt: skip

    def operator(self, environment: Mapping[str, str]) -> int:
        """Stands for every operator: counts the payload, writes what the gate writes."""
        folders = dict(one.split(":", 1) for one in environment["NVIDIA_CLARA_INPUTPATHS"].split(";"))
        self.seen.append(len(list(Path(folders["payload"]).rglob("*.dcm"))))
        outputs = dict(one.split(":", 1) for one in environment["NVIDIA_CLARA_OUTPUTPATHS"].split(";"))
        if "findings" in outputs:
            (Path(outputs["findings"]) / "findings.json").write_text(json.dumps([]))
        return 0

    def request(self, job: str = "j1", *, revision: int = 1, definition: ObjectRef | None = None) -> None:
        entries = []
        for number in range(5):
            ref = self.store.put(DATA + bytes(2 * number))
            entries.append(ManifestEntry(
                study_uid=StudyUid("1.9"), series_uid=SeriesUid("1.9.1"),
                sop_instance_uid=SopInstanceUid(f"1.9.{number}"),
                sop_class_uid="1.2", transfer_syntax_uid="1.2.840.10008.1.2.1", digest=ref.digest, object=ref,
            ))  # fmt: skip
        manifest = self.store.put(Manifest(group_id="g", revision=revision, entries=tuple(entries)).encode())
        event = JobRequested(
            subject=job, sequence=1, time=MOMENT + timedelta(seconds=revision), source="t", name=job, pipeline_id="p",
            definition=definition or self.store.put(DEFINITION), group_id=f"g{job[0]}", revision=revision,
            manifest=manifest, priority="normal", destinations=(), studies=("1.9",),
        )  # fmt: skip
        self.bus.publish([event])

    def settle(self) -> None:
        for _ in range(200):
            try:
                moved = self.engine.step()
            except TransientError:
                moved = True
            if not moved:
                self.clock.advance(timedelta(seconds=3))
                if set(self.states().values()) <= {"succeeded", "failed", "superseded"}:
                    return
        raise AssertionError(f"the engine never came to rest: {self.states()}")

    def states(self) -> dict[str, str]:
        with self.database.reading() as connection:
            return {row.job_id: row.state for row in connection.execute(sa.select(jobs))}

    def row(self, job: str = "j1") -> Any:
        with self.database.reading() as connection:
            return connection.execute(sa.select(jobs).where(jobs.c.job_id == job)).one()


@pytest.mark.parametrize("error", [OSError(5, "EIO"), StoreUnavailableError("EIO")])
def test_no_operator_sees_part_of_a_payload(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)
    rig.request()
    reads, read = [0], rig.store.read

    def third_fails_once(ref: ObjectRef) -> bytes:
        reads[0] += 1
        if reads[0] == 5:
            raise error
        return read(ref)

    monkeypatch.setattr(rig.store, "read", third_fails_once)
    rig.settle()
    assert (rig.row().state, rig.row().attempt) == ("succeeded", 2)
    assert set(rig.seen) == {5}


def test_a_payload_that_can_never_be_written_fails_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.request()
    manifest_read, read = [0], rig.store.read

    def fails(ref: ObjectRef) -> bytes:
        manifest_read[0] += 1
        if ref.size_bytes < 100:
            raise StoreUnavailableError("bad sector")
        return read(ref)

    monkeypatch.setattr(rig.store, "read", fails)
    rig.settle()
    assert (rig.row().state, rig.row().cause) == ("failed", "RetriesExhaustedError")
    assert "bad sector" in rig.row().reason
    assert rig.seen == []


@pytest.mark.parametrize("method", ["fail", "succeed", "operator_ended", "operator_started", "start"])
def test_a_busy_database_leaves_no_job_behind(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bites: let the engine forget an attempt before the ledger knows, and it stays running for ever."""
    rig = Rig(tmp_path, (lambda _: 1) if method == "fail" else None)
    rig.request()
    real, failures = getattr(rig.ledger, method), [2]

    def busy(*arguments: Any, **named: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise BusUnavailableError("locked")
        return real(*arguments, **named)

    monkeypatch.setattr(rig.ledger, method, busy)
    rig.settle()
    assert rig.states() == {"j1": "failed" if method == "fail" else "succeeded"}
    assert rig.row().attempt == 1


def test_a_superseded_job_does_not_come_back_with_a_new_engine(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.request("j1", revision=1)
    rig.bus.step()
    job = rig.ledger.next_job([])
    assert job is not None
    assert rig.ledger.start(job, []) == 1
    rig.request("j2", revision=2)
    rig.engine = rig.make()
    rig.settle()
    assert rig.states() == {"j1": "superseded", "j2": "succeeded"}
    assert rig.ledger.start(job, []) is None, "nor from a view that is older than the ledger"


def test_a_newer_revision_supersedes_a_failed_one(tmp_path: Path) -> None:
    rig = Rig(tmp_path, lambda environment: int(environment["CLARION_JOB_ID"] == "j1") or rig.operator(environment))
    rig.request("j1", revision=1)
    rig.settle()
    assert rig.states() == {"j1": "failed"}
    rig.request("j2", revision=2)
    rig.settle()
    assert rig.states() == {"j1": "superseded", "j2": "succeeded"}


def test_one_unreadable_definition_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)
    bad = rig.store.put(b"bad")
    rig.request("a", definition=ObjectRef(location="memory:0", digest="0" * 64, size_bytes=1))
    rig.request("b", definition=bad)
    rig.request("c")
    read, failures = rig.store.read, [3]

    def unreliable(ref: ObjectRef) -> bytes:
        if ref == bad and failures[0]:
            failures[0] -= 1
            raise StoreUnavailableError("not now")
        return read(ref)

    monkeypatch.setattr(rig.store, "read", unreliable)
    rig.settle()
    assert rig.states() == {"a": "failed", "b": "failed", "c": "succeeded"}
    assert rig.row("a").cause == "MissingObjectError"
    assert rig.row("b").cause == "InvalidPipelineError"


class Killing(InlineExecutor):
    """Says of the first works that something killed them."""

    def __init__(self, run: Callable[[Mapping[str, str]], int], times: int) -> None:
        super().__init__(run)
        self.times = times

    def poll(self, work_id: str) -> WorkState:
        if self.times and work_id.endswith("/reader"):
            self.times -= 1
            return WorkState(exit_status=-9, reason=f"{KILLED} {signal.SIGKILL}")
        return super().poll(work_id)


@pytest.mark.parametrize(("times", "state"), [(1, "succeeded"), (2, "succeeded"), (3, "failed")])
def test_an_operator_that_was_killed_is_tried_again(times: int, state: str, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.executor = Killing(rig.operator, times)
    rig.engine = rig.make()
    rig.request()
    rig.settle()
    assert (rig.row().state, rig.row().attempt) == (state, min(times + 1, 3))
    assert state == "succeeded" or KILLED in rig.row().reason


def test_an_orderly_stop_is_not_held_against_a_job(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.request()
    for _ in range(5):
        rig.engine.step()
        rig.engine.drain()
        assert rig.states() == {"j1": "requested"}
        rig.engine = rig.make()
    rig.settle()
    assert (rig.row().state, rig.row().retries) == ("succeeded", 0)


def test_trouble_of_ours_fails_the_job_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)
    rig.request()

    def broken(_: str) -> WorkState:
        raise ZeroDivisionError("Doe^Jane")

    monkeypatch.setattr(rig.executor, "poll", broken)
    rig.settle()
    assert (rig.row().state, rig.row().cause) == ("failed", "InternalError")
    assert "ZeroDivisionError" in rig.row().reason
    assert "Doe" not in rig.row().reason


def test_inputs_are_read_only_and_can_be_removed_again(tmp_path: Path) -> None:
    """As somebody who is not root: a sealed folder takes no change, and its owner can still remove it."""
    folder = tmp_path / "work" / "inner"
    folder.mkdir(parents=True)
    (folder / "input.dcm").write_bytes(b"x")
    if os.geteuid() == 0:
        for path in (tmp_path, tmp_path / "work", folder, folder / "input.dcm"):
            os.chown(path, 65534, 65534)
    seal(tmp_path / "work")
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "work").rglob("*.dcm")} == {"400"}

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        for change in (lambda: (folder / "input.dcm").write_bytes(b"y"), (folder / "new").touch):
            with pytest.raises(PermissionError):
                change()
        assert (folder / "input.dcm").read_bytes() == b"x"
        remove(tmp_path / "work")
        assert not (tmp_path / "work").exists()

    for above in tmp_path.parents:
        if above.stat().st_uid == os.geteuid() and str(above).startswith(tempfile.gettempdir() + "/"):
            above.chmod(0o755)
    assert os.waitstatus_to_exitcode(os.waitpid(fork(as_nobody, tmp_path / "log"), 0)[1]) == 0
