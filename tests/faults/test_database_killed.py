"""F27: PostgreSQL is killed again and again while studies are sent; receiving goes on, and all of it arrives once."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import postgres
from support.dcmtk import storescu
from support.processes import start_pacs
from support.system import System, running
from support.world import free_port, judge, make_series, pause, write_config

from clarion.errors import BusUnavailableError
from clarion.testing.phantom import PhantomSpec

KILLS = 10
STUDIES = 4
SLICES = 6


@pytest.fixture
def server() -> Iterator[postgres.Server]:
    server = postgres.start_server()
    if server.process is None:
        pytest.skip("CLARION_TEST_DATABASE names a server that is not ours to kill")
    yield server
    server.stop()


class Killer(threading.Thread):
    """Kills the server and starts it again, KILLS times."""

    def __init__(self, server: postgres.Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.killed = 0
        self.ending = threading.Event()

    def run(self) -> None:
        rng = random.Random(27)
        while self.killed < KILLS and not self.ending.wait(rng.uniform(0.5, 2.5)):
            self._server.kill()
            self.killed += 1
            self.ending.wait(rng.uniform(0.2, 1.5))
            self._server.start()


def series(root: Path, number: int) -> list[Path]:
    return make_series(root / f"s{number}", PhantomSpec(slices=SLICES, size=64, length_mm=160, seed=70 + number))


def on(url: str, config: Path) -> Path:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "database": {"url": url}}))
    return config


def test_killed_ten_times_while_studies_are_sent(server: postgres.Server, tmp_path: Path) -> None:
    """Judged by the sender's own list, as F01 and F02 are; what was sent while the server was away counts as well."""
    scp, port = free_port(), free_port()
    pacs = start_pacs(tmp_path / "pacs", port, "PACS", ("CLARION", scp))
    url = server.database("killed")
    acknowledged: set[tuple[str, ...]] = set()
    killer = Killer(server)
    try:
        with running(on(url, write_config(tmp_path, scp=scp, pacs=port))) as system:
            killer.start()
            for number in range(STUDIES):
                files = series(tmp_path, number)
                for first in range(0, SLICES, 2):
                    new = storescu(files[first : first + 2], scp)
                    assert len(new) == 2, "receiving needs the local disk alone"
                    acknowledged |= new
                    pause(0.3)
                    system.supervisor.look()
            killer.join(180)
            assert killer.killed == KILLS
            system.wait_for(lambda: states(system) == ["Verified"] * STUDIES, "every study verified", 240)
        judge(tmp_path, acknowledged, studies=STUDIES, url=url)
    finally:
        killer.ending.set()
        pacs.kill()


def states(system: System) -> list[str]:
    try:
        return [system.view(one).state for one in system.studies()]
    except BusUnavailableError:
        return []


def test_receiving_starts_without_a_database_and_the_rest_follows(server: postgres.Server, tmp_path: Path) -> None:
    """What was sent before the database was there is grouped and delivered when it is."""
    scp, port = free_port(), free_port()
    pacs = start_pacs(tmp_path / "pacs", port, "PACS", ("CLARION", scp))
    url = server.database("late")
    server.kill()
    try:
        with running(on(url, write_config(tmp_path, scp=scp, pacs=port))) as system:
            assert len(storescu(series(tmp_path, 9), scp)) == SLICES
            server.start()
            system.wait_for(lambda: states(system) == ["Verified"], "the study verified", 120)
    finally:
        pacs.kill()
