"""F02: `kill -9` of every process of a running Clarion while DCMTK sends; then the same judgement as F01."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from support.dcmtk import storescu
from support.processes import start_pacs
from support.world import free_port, make_series, pause, uid_of, write_config

from clarion.adapters.database import Database
from clarion.adapters.embedded import dead_letters
from clarion.adapters.files import FileStore
from clarion.model import ObjectRef
from clarion.testing.pacs import read_contents
from clarion.testing.phantom import PhantomSpec
from console.checks import check_config
from console.stages import STAGES
from console.supervisor import Supervisor
from gateway import tables
from streams.queries import read_story, state_of

KILLS = 12
STUDIES = 4
DEADLINE_S = 240.0


def test_kill_every_process(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Bites: drop the fsync order in JournalWriter and nothing changes here (a kill keeps the page cache); answer
    before the journal append and instances are lost."""
    scp, pacs_port = free_port(), free_port()
    pacs = start_pacs(tmp_path / "pacs", pacs_port, "PACS", ("CLARION", scp))
    request.addfinalizer(pacs.kill)
    checked = check_config(write_config(tmp_path, scp=scp, pacs=pacs_port))
    with (tmp_path / "clarion.log").open("ab") as log:
        supervisor = Supervisor(checked, log)
        supervisor.start()
        request.addfinalizer(supervisor.stop)
        acknowledged = _send_and_kill(tmp_path, supervisor, scp)
        database = Database(checked.config.database_url)
        _wait_until_verified(database, supervisor, tmp_path)
    _judge(database, FileStore(tmp_path / "data" / "objects"), acknowledged, tmp_path)


def _send_and_kill(root: Path, supervisor: Supervisor, port: int) -> set[tuple[str, str]]:
    rng = random.Random(7)
    victims = [*STAGES, *STAGES]
    rng.shuffle(victims)
    pending = {
        index: make_series(root / f"series{index}", PhantomSpec(slices=6, size=64, length_mm=160, seed=index))
        for index in range(STUDIES)
    }
    acknowledged: set[tuple[str, str]] = set()
    end = time.monotonic() + DEADLINE_S
    kills = 0
    while pending or kills < KILLS:
        assert time.monotonic() < end, f"not sent in time; {kills} kills"
        index = rng.choice(sorted(pending)) if pending else None
        if kills < KILLS and supervisor.ready(0):
            os.kill(supervisor.pid_of(victims[kills]), signal.SIGKILL)
            kills += 1
        if index is not None:
            acknowledged |= storescu(pending[index], port)
            done = {uid for uid, _ in acknowledged}
            pending[index] = [path for path in pending[index] if uid_of(path) not in done]
            if not pending[index]:
                pending.pop(index)
        supervisor.look()
        pause(0.1)
    return acknowledged


def _wait_until_verified(database: Database, supervisor: Supervisor, root: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        supervisor.look()
        with database.reading() as connection:
            studies = list(connection.execute(sa.select(tables.studies.c.study_uid)).scalars())
        states = [state_of(read_story(database, uid)) for uid in studies]
        if len(states) == STUDIES and set(states) == {"Verified"}:
            return
        pause(0.2)
    raise AssertionError(f"states {states}; {(root / 'clarion.log').read_text()[-3000:]}")


def _judge(database: Database, store: FileStore, acknowledged: set[tuple[str, str]], root: Path) -> None:
    with database.reading() as connection:
        rows = connection.execute(sa.select(tables.instances)).all()
        assert {(row.sop_instance_uid, row.digest) for row in rows} >= acknowledged, "lost"
        for row in rows:
            assert hashlib.sha256(store.read(ObjectRef(**row.object))).hexdigest() == row.digest
        members = set(connection.execute(sa.select(tables.members.c.sop_instance_uid)).scalars())
        assert members >= {uid for uid, _ in acknowledged}
        assert not connection.execute(sa.select(dead_letters)).all()
        deliveries = connection.execute(sa.select(tables.deliveries)).all()
        assert {row.state for row in deliveries} == {"verified"}
        sent = set(connection.execute(sa.select(tables.delivery_instances.c.sop_instance_uid)).scalars())
    kept = [one.sop_instance_uid for one in read_contents(root / "pacs")]
    assert len(kept) == len(set(kept))
    assert set(kept) == sent


def test_no_operator_outlives_a_killed_engine(tmp_path: Path) -> None:
    """Bites: without `end_with_parent` in the runner the operator sleeps on."""
    script = tmp_path / "engine.py"
    script.write_text(
        "import subprocess, sys, os\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        "'import os, threading; from clarion.processes import end_with_parent; "
        'end_with_parent(os.environ["PARENT"]); print(os.getpid(), flush=True); threading.Event().wait(60)\'],'
        " env={**os.environ, 'PARENT': str(os.getpid())}, start_new_session=True, stdout=sys.stdout)\n"
        "child.wait()\n"
    )
    engine = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    child = int(engine.stdout.readline())
    engine.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < end, "the operator outlived its engine"
        pause(0.02)
    engine.wait()
