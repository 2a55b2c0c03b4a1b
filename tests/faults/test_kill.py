"""F02: `kill -9` of every process of a running Clarion while DCMTK, pynetdicom and STOW-RS send; judged as F01."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

import httpx
import pytest
import sqlalchemy as sa
from pynetdicom import AE
from support.dcmtk import storescu
from support.processes import start_pacs
from support.world import free_port, judge, make_series, pause, uid_of, write_config

from clarion.adapters.database import Database
from clarion.dicom import split_part10
from clarion.digests import digest_of
from clarion.service import read_heartbeats
from clarion.testing.phantom import PhantomSpec
from console.checks import check_config
from gateway import tables
from streams.queries import read_story, state_of

KILLS = 32
STUDIES = 6
TOKEN = "a-token-for-the-kill-test"
SLICES = 10
PACE_S = 1.5
DEADLINE_S = 280.0


def test_kill_every_process_while_sending(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """F02. Stages, operators and twice the supervisor itself are killed while three kinds of client send and jobs run.

    Bites: answer before the journal append and instances are lost. (A kill keeps the page cache: drop a sync and
    nothing changes here; that is what `test_sync.py` is for.)
    """
    scp, pacs_port = free_port(), free_port()
    pacs = start_pacs(tmp_path / "pacs", pacs_port, "PACS", ("CLARION", scp))
    request.addfinalizer(pacs.kill)
    web = free_port()
    stow = {"port": web, "clients": [{"ae_title": "SENDER", "token": TOKEN}]}
    config = write_config(tmp_path, scp=scp, pacs=pacs_port, stow=stow)
    with Upheld(config, tmp_path / "clarion.log") as clarion:
        ways = [partial(storescu, port=scp), partial(store_by_pynetdicom, port=scp), partial(store_by_stow, port=web)]
        sender = Sender(tmp_path, ways)
        sender.start()
        killed = _kill_meanwhile(clarion)
        end = time.monotonic() + DEADLINE_S
        while sender.is_alive():
            clarion.look()
            assert time.monotonic() < end, "not sent in time"
            pause(0.1)
        assert sum(killed.values()) == KILLS
        assert {
            "intake",
            "grouping",
            "streams",
            "orchestrator",
            "delivery",
            "console",
            "supervisor",
            "worker",
            "guard",
            "stow",
        } <= set(killed)
        database = Database(check_config(config).config.database_url)
        _wait_until_verified(database, clarion)
    judge(tmp_path, sender.acknowledged, studies=STUDIES)


class Upheld:
    """`clarion up` as a process of its own, started again when it was killed."""

    def __init__(self, config: Path, log: Path) -> None:
        self.config, self.log = config, log
        self.data = check_config(config).config.data

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0, self.log.read_text()[-2000:]

    def _start(self) -> None:
        command = [str(Path(sys.executable).parent / "clarion"), "up", "-c", str(self.config)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)

    def look(self) -> None:
        """Start it again if it has ended; its stages go with it, so the lock is free a moment later."""
        if self.process.poll() is not None:
            self._start()

    def pids(self) -> dict[str, int]:
        """Give the process ids of what runs now: stages by their heartbeats, an operator by its parent."""
        beats = {one.stage: one.pid for one in read_heartbeats(self.data / "run") if one.alive}
        found = {**beats, "supervisor": self.process.pid, **self._receiving()}
        if "orchestrator" in beats:
            children = Path(f"/proc/{beats['orchestrator']}/task/{beats['orchestrator']}/children")
            running = children.read_text().split() if children.exists() else []
            found |= {"operator": int(running[0])} if running else {}
        return found

    def _receiving(self) -> dict[str, int]:
        """Give the guard and a worker, as receiving says they are; what has been killed is not among them."""
        said = next((one.facts for one in read_heartbeats(self.data / "run") if one.stage == "intake"), {})
        pids = {name: pid for name, pid in said.get("processes", {}).items() if Path(f"/proc/{pid}").exists()}  # type: ignore[attr-defined]
        return {name.split("-")[0]: pid for name, pid in pids.items()}


class Sender(threading.Thread):
    """Sends every study, in turn by each of the ways, until all of it is acknowledged; keeps the list."""

    def __init__(self, root: Path, ways: list[Callable[[list[Path]], set[tuple[str, str]]]]) -> None:
        super().__init__(daemon=True)
        self._ways = itertools.cycle(ways)
        self._pending = [
            make_series(root / f"series{index}", PhantomSpec(slices=SLICES, size=64, length_mm=160, seed=index))
            for index in range(STUDIES)
        ]
        self.acknowledged: set[tuple[str, ...]] = set()
        self.stop = threading.Event()

    def run(self) -> None:
        """One study after the other, two instances at a time: jobs of the one run while the next is sent."""
        for files in self._pending:
            while files and not self.stop.wait(PACE_S):
                self.acknowledged |= next(self._ways)(files[:2])
                done = {uid for uid, _ in self.acknowledged}
                files[:] = [path for path in files if uid_of(path) not in done]


def store_by_pynetdicom(files: list[Path], port: int) -> set[tuple[str, str]]:
    """Send files with pynetdicom; gives (SOP Instance UID, digest) of what was acknowledged."""
    ae = AE(ae_title="SENDER")
    ae.add_requested_context("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1")
    ae.acse_timeout = ae.dimse_timeout = 20
    association = ae.associate("127.0.0.1", port, ae_title="CHEST")
    acknowledged = set()
    for path in files if association.is_established else ():
        with contextlib.suppress(RuntimeError, ValueError):  # the association has ended meanwhile
            if association.send_c_store(path).get("Status") == 0:
                # It encodes anew what it has parsed; the digest is of what it sends.
                acknowledged.add((uid_of(path), digest_of(split_part10(path.read_bytes())[0])))
    if association.is_established:
        association.release()
    return acknowledged


def store_by_stow(files: list[Path], port: int) -> set[tuple[str, str]]:
    """Send files in one request; gives (SOP Instance UID, digest) of what was acknowledged."""
    parts = [b"--b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n" % path.read_bytes() for path in files]
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Content-Type": 'multipart/related; type="application/dicom"; boundary=b',
    }
    url = f"http://127.0.0.1:{port}/CHEST/studies"
    try:
        answer = httpx.post(url, content=b"".join([*parts, b"--b--\r\n"]), headers=headers, timeout=20)
        said = answer.json().get("00081199", {}).get("Value", [])
    except (httpx.HTTPError, ValueError):
        return set()
    stored = {one["00081155"]["Value"][0] for one in said}
    return {(uid_of(path), digest_of(split_part10(path.read_bytes())[0])) for path in files if uid_of(path) in stored}


def _kill_meanwhile(clarion: Upheld) -> dict[str, int]:
    """Kill at random, each kind of process in turn, the next one when Clarion has come back far enough to have it."""
    rng = random.Random(7)
    killed: dict[str, int] = {}
    end = time.monotonic() + DEADLINE_S
    kinds = ["worker", "grouping", "streams", "orchestrator", "delivery", "console", "operator", "intake", "worker"]
    kinds += ["guard", "stow"]
    order = [*kinds, "supervisor", *kinds, *rng.sample(kinds, 8), "supervisor"]
    assert len(order) == KILLS
    for kind in order:
        last = time.monotonic() + 12
        while kind not in (there := clarion.pids()):
            clarion.look()
            # An operator runs only now and then: kill the engine in its stead.
            kind = "orchestrator" if kind == "operator" and time.monotonic() > last else kind  # noqa: PLW2901
            assert time.monotonic() < end, f"{kind} did not come back; {killed}; {clarion.log.read_text()[-2000:]}"
            pause(0.02)
        pause(rng.random() * 0.4)
        with contextlib.suppress(ProcessLookupError):
            os.kill(there[kind], signal.SIGKILL)
        killed[kind] = killed.get(kind, 0) + 1
        clarion.look()
    return killed


def _wait_until_verified(database: Database, clarion: Upheld) -> None:
    end = time.monotonic() + DEADLINE_S
    states: list[str] = []
    while time.monotonic() < end:
        clarion.look()
        with database.reading() as connection:
            studies = list(connection.execute(sa.select(tables.studies.c.study_uid)).scalars())
        states = [state_of(read_story(database, uid)) for uid in studies]
        if len(states) == STUDIES and set(states) == {"Verified"}:
            return
        pause(0.2)
    raise AssertionError(f"states {states}; {clarion.log.read_text()[-3000:]}")


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
