"""What every executor promises: a known id finds the running work, a time limit, an end of the whole tree."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from support.world import pause

from clarion.model import OperatorWork, WorkState
from clarion.plugins import Executor
from clarion.testing.executor import InlineExecutor
from orchestrator.executors.local import LocalExecutor


def work(folder: Path, code: str, *, timeout_s: float = 20, work_id: str = "job/1/op") -> OperatorWork:
    return OperatorWork(
        work_id=work_id,
        operator="op",
        command=(sys.executable, "-c", code),
        environment={"PATH": os.environ["PATH"]},
        folder=str(folder),
        log=str(folder / "op.log"),
        timeout_s=timeout_s,
    )


def ended(executor: Executor, work_id: str = "job/1/op") -> WorkState:
    end = time.monotonic() + 20
    while (state := executor.poll(work_id)).exit_status is None:
        assert time.monotonic() < end
        pause(0.01)
    return state


def test_exit_status_and_log(tmp_path: Path) -> None:
    executor = LocalExecutor()
    executor.submit(work(tmp_path, "print('said'); raise SystemExit(3)"))
    assert ended(executor).exit_status == 3
    assert (tmp_path / "op.log").read_text() == "said\n"


def test_known_id_is_not_started_again(tmp_path: Path) -> None:
    executor = LocalExecutor()
    one = work(tmp_path, "open('ran', 'a').write('x')")
    executor.submit(one)
    ended(executor)
    executor.submit(one)
    assert ended(executor).exit_status == 0
    assert (tmp_path / "ran").read_text() == "x"


def test_unknown_id_is_lost() -> None:
    assert LocalExecutor().poll("nobody").reason == "lost"
    assert InlineExecutor(lambda _: 0).poll("nobody").reason == "lost"


def test_time_limit_ends_the_whole_tree(tmp_path: Path) -> None:
    """Bites: kill the process alone and its child writes on."""
    code = (
        "import subprocess, sys, threading\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import threading; threading.Event().wait(60)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
        "threading.Event().wait(60)\n"
    )
    executor = LocalExecutor()
    executor.submit(work(tmp_path, code, timeout_s=1.5))
    state = ended(executor)
    assert state.reason.startswith("time-limit")
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 5
    while _runs(child):
        assert time.monotonic() < end, "a child outlived the time limit"
        pause(0.01)


def test_environment_is_only_what_was_given(tmp_path: Path) -> None:
    os.environ["CLARION_SECRET_OF_THE_TEST"] = "secret"
    executor = LocalExecutor()
    executor.submit(work(tmp_path, "import os; print(sorted(os.environ))"))
    ended(executor)
    assert "SECRET" not in (tmp_path / "op.log").read_text()


def test_inline_executor_gives_the_status(tmp_path: Path) -> None:
    executor = InlineExecutor(lambda environment: 0 if environment["PATH"] else 1)
    executor.submit(work(tmp_path, ""))
    assert executor.poll("job/1/op").exit_status == 0


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
