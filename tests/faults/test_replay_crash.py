"""F01 for replays: the process ends before and after each of their effects; every item is done once all the same."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.site import Site
from support.world import fork

from clarion import crashpoints
from clarion.errors import PermanentError
from console.replay_plan import PlanRequest, make_plan
from console.selection import Selection
from streams.replays import Limits, Replay, command, find_replay, list_replays, read_items

FAST = Limits(per_minute=100_000, in_flight=3, stop_above_percent=100)
POINTS = [
    (f"{side}:{name}#{count}", mode)
    for name, mode in (
        ("replay.order", "redeliver"), ("replay.order", "rerun"), ("replay.settle", "rerun"),
        ("ledger.retry", "failed"), ("delivery.replay", "send"),
    )
    for side in ("before", "after")
    for count in (1, 3)
]  # fmt: skip


def plan(site: Site, mode: str) -> Replay:
    site.clock.advance(timedelta(seconds=1))
    request = PlanRequest(
        mode=mode, reason="a test", by="t", selection=Selection(), destinations=("pacs",), limits=FAST, again=True
    )
    return find_replay(site.database, make_plan(site.app, request))


def filled(root: Path) -> Site:
    """Four studies whose jobs failed, four that went well, four whose jobs never were."""
    site = Site(root)
    ends = {site.receive(number).subject: ("failed", "succeeded", "missing")[number % 3] for number in range(1, 13)}
    site.outcome = lambda group_id: "failed" if ends[group_id] == "failed" else "succeeded"
    site.settle()
    site.forget({group_id for group_id, end in ends.items() if end == "missing"})
    site.outcome = lambda _: "succeeded"
    return site


@pytest.mark.parametrize(("point", "mode"), POINTS)
def test_every_item_is_done_once(point: str, mode: str, tmp_path: Path) -> None:
    """Bites: order an item and note it in two transactions, or follow an order without remembering it."""
    reference = filled(tmp_path / "reference")
    undisturbed = run(reference, plan(reference, mode))
    site = filled(tmp_path / "killed")
    replay = plan(site, mode)
    assert replay.items >= 4
    command(site.database, replay, "run", by="t", now=site.clock.now())
    site.close()
    site.database.close()

    def child() -> None:
        crashpoints.arm(point)
        run_on(Site(tmp_path / "killed"), replay)

    status = os.waitpid(fork(child, tmp_path / "log"), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert run_on(Site(tmp_path / "killed"), replay) == undisturbed


def run(site: Site, replay: Replay) -> dict[str, Any]:
    command(site.database, replay, "run", by="t", now=site.clock.now())
    return run_on(site, replay)


def run_on(site: Site, replay: Replay) -> dict[str, Any]:
    """Go on to the end; gives what there is then. Events that repeat work would show in the attempts and sequences."""
    for _ in range(20):
        site.settle()
        site.clock.advance(timedelta(seconds=61))
        if find_replay(site.database, replay.replay_id).state == "finished":
            items = read_items(site.database, replay.replay_id, limit=100)
            states = [(one["action"], one["target"], one["state"]) for one in items]
            return {"items": states, "jobs": site.jobs(), "deliveries": site.deliveries()}
    raise AssertionError("the replay did not end")


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_plan_that_was_not_finished_is_no_plan(side: str, count: int, tmp_path: Path) -> None:
    """It is whole or cannot be seen, and another one can be made."""
    site = filled(tmp_path)
    site.close()
    site.database.close()

    def child() -> None:
        crashpoints.arm(f"{side}:replay.plan#{count}")
        plan(Site(tmp_path), "rerun")

    status = os.waitpid(fork(child), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    again = Site(tmp_path)
    whole = side == "after" and count == 3
    assert [one.items for one in list_replays(again.database)] == ([12] if whole else [])
    if not whole:
        with pytest.raises(PermanentError, match="no replay"):
            find_replay(again.database, "")
    again.clock.advance(timedelta(seconds=60))
    assert plan(again, "rerun").items == 12


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_command_is_followed_or_not(side: str, tmp_path: Path) -> None:
    site = filled(tmp_path)
    replay = plan(site, "rerun")
    site.close()
    site.database.close()

    def child() -> None:
        crashpoints.arm(f"{side}:replay.state")
        again = Site(tmp_path)
        command(again.database, replay, "cancel", by="t", now=again.clock.now())

    assert os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1]) == -signal.SIGKILL
    assert find_replay(Site(tmp_path).database, replay.replay_id).state == (
        "planned" if side == "before" else "cancelled"
    )
