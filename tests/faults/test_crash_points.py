"""F01: the process ends before and after every effect of the flow; afterwards I1 to I6 hold (docs/faults.md)."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import scipy.ndimage  # noqa: F401  as below
from support.results import make_results
from support.world import Case, fork, make_series

# Imported before the first fork, so that no case pays for it.
import streams.stage  # noqa: F401
from clarion import crashpoints
from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus, read_dead_letters, read_lag
from clarion.adapters.memory import ManualClock
from clarion.crashpoints import EFFECTS
from clarion.errors import PermanentError
from clarion.events import Event, JobStarted
from clarion.testing.suites import MOMENT, Recorder, drain, started

SEEDS = (1, 2, 3)
# Passed only when something fails; they have cases of their own below.
ONLY_ON_FAILURE = {"ledger.fail", "bus.deadletter"}
POINTS = [f"{side}:{name}" for name in EFFECTS if name not in ONLY_ON_FAILURE for side in ("before", "after")]


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    # What the libraries load at their first use is loaded before the first fork, so that no case pays for it.
    make_results(tmp_path_factory.mktemp("warm"))
    return make_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="session")
def reference(series: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One undisturbed run: it must satisfy the same judge, and tells how often each point is passed."""
    case = Case(tmp_path_factory.mktemp("reference") / "case", series, None, 0)
    case.run()
    case.judge()
    assert case.kills == 0
    return case


def test_reference_passes_every_point(reference: Case) -> None:
    """A point nobody passes would test nothing."""
    assert len(POINTS) >= 60
    assert set(POINTS) <= set(reference.passes), sorted(set(POINTS) - set(reference.passes))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("point", POINTS)
def test_crash(point: str, seed: int, reference: Case, series: list[Path], tmp_path: Path) -> None:
    """Bites: move the journal append behind the answer in Intake._receive, and `after:scp.respond` loses instances."""
    # The last passes differ from run to run; stay where every run comes.
    most = max(1, reference.passes[point] // 2)
    at = 1 if seed == SEEDS[0] else random.Random(f"{point}{seed}").randint(1, most)
    case = Case(tmp_path / "case", series, f"{point}#{at}", seed)
    case.run()
    assert case.kills == 1, "the point was not reached"
    case.judge()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("side", ["before", "after"])
def test_crash_while_a_job_fails(side: str, seed: int, tmp_path: Path) -> None:
    """A pipeline given MR instead of CT fails once, with its reason, whatever happens in between."""
    series = make_series(tmp_path / "series", modality="MR")
    case = Case(tmp_path / "case", series, f"{side}:ledger.fail#1", seed, final="Failed")
    case.run()
    assert case.kills == 1
    case.judge()


def _refuse_the_first(event: Event) -> Exception | None:
    return PermanentError("the reason") if event.sequence == 1 else None


@pytest.mark.parametrize("side", ["before", "after"])
def test_crash_while_a_dead_letter_is_written(side: str, tmp_path: Path) -> None:
    """It is written once, and the record behind it is still handled."""
    url = f"sqlite:///{tmp_path / 'bus.db'}"

    def consume(point: str | None) -> list[int]:
        crashpoints.arm(point)
        recorder = Recorder(trouble=_refuse_the_first)
        bus = EmbeddedBus(Database(url), ManualClock(MOMENT))
        bus.subscribe("suite", [JobStarted], recorder)
        drain(bus)
        return [event.sequence for event in recorder.seen]

    EmbeddedBus(Database(url), ManualClock(MOMENT)).publish([started("a", 1), started("a", 2)])
    status = os.waitpid(fork(lambda: consume(f"{side}:bus.deadletter")), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert consume(None) == [2]
    database = Database(url)
    assert [one.reason for one in read_dead_letters(database)] == ["the reason"]
    assert [one.behind for one in read_lag(database)] == [0]
