"""What `clarion replay` says and asks; the page and the command line share it."""

from __future__ import annotations

import getpass
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from console.exits import DONE, FAILED, TRANSIENT
from streams.replays import command, count_reasons, find_replay, read_items

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from console.app import App
    from streams.replays import Replay

_LOOK_S = 0.5
_ENDED = ("finished", "cancelled", "stopped")
_REASONS = 12


def whoami() -> str:
    """Give the account that speaks, as far as this machine knows it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def describe(database: Database, replay: Replay) -> dict[str, Any]:
    """Give a replay as JSON holds it."""
    counted = count_reasons(database, replay.replay_id)
    reasons = [{"action": action, "reason": reason, "count": count} for action, reason, count in counted]
    return {**asdict(replay), "actions": _by_action(counted), "reasons": reasons}


def _by_action(counted: list[tuple[str, str, int]]) -> dict[str, int]:
    actions: Counter[str] = Counter()
    for action, _, count in counted:
        actions[action] += count
    return dict(actions)


def command_replay(app: App, replay: Replay, verb: str) -> Replay:
    """Do what a person says, and give the replay as it stands then."""
    command(app.database, replay, verb, by=whoami(), now=app.clock.now())
    return find_replay(app.database, replay.replay_id)


def ask(database: Database, replay: Replay) -> None:
    """Show the count and the destinations and let the person confirm."""
    actions = sorted(_by_action(count_reasons(database, replay.replay_id)).items())
    said = ", ".join(f"{count} {name}" for name, count in actions if name != "skip") or "nothing"
    where = ", ".join(replay.destinations) or "no destination (results stay here)"
    typer.confirm(f"{replay.mode}: {said}; to {where}. Run it?", abort=True, err=True)


def status_code(replay: Replay) -> int:
    """Give the exit status that says how a replay ended, or that it has not."""
    if replay.state not in _ENDED:
        return TRANSIENT
    return DONE if replay.state == "finished" and not replay.counts.get("failed") else FAILED


def say_progress(replay: Replay) -> str:
    """Say in one line how far it has come."""
    counts = ", ".join(f"{count} {state}" for state, count in sorted(replay.counts.items())) or "nothing to do"
    read = f"; {replay.records_read} events read" if replay.records_read else ""
    return f"{replay.replay_id}  {replay.state}  {counts}{read}" + (f"  ({replay.note})" if replay.note else "")


def watch(app: App, replay: Replay, *, quiet: bool) -> Replay:
    """Wait until it has ended and show the progress; Ctrl-C only stops watching."""
    screen = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal) as bar:
        row = bar.add_task(replay.mode, total=replay.items)
        while replay.state == "running":
            time.sleep(_LOOK_S)
            replay = find_replay(app.database, replay.replay_id)
            bar.update(row, completed=replay.counts.get("done", 0) + replay.counts.get("failed", 0))
    return replay


def show(database: Database, replay: Replay, items: int = 20) -> None:
    """Print a replay for a person."""
    screen = Console(soft_wrap=True)
    screen.print(f"[bold]{replay.mode}[/] {replay.replay_id}  [bold]{replay.state}[/] {escape(replay.note)}")
    screen.print(f"  why         {escape(replay.reason)}", highlight=False)
    screen.print(f"  planned     {replay.created[:19]} by {escape(replay.planned_by)}", highlight=False)
    if replay.started:
        ended = f", ended {replay.finished[:19]}" if replay.finished else ""
        screen.print(f"  run         {replay.started[:19]} by {escape(replay.run_by)}{ended}", highlight=False)
    said = "; ".join(f"{name} {value}" for name, value in replay.selection.items()) or "everything"
    screen.print(f"  selection   {escape(said)}", highlight=False)
    screen.print(f"  results to  {', '.join(replay.destinations) or 'no destination: they stay here'}", highlight=False)
    screen.print(f"  plan        sha256 {replay.digest}", highlight=False)
    screen.print(f"  estimate    {replay.minutes:.1f} job minutes", highlight=False)
    reasons = count_reasons(database, replay.replay_id)
    for action, reason, count in reasons[:_REASONS]:
        screen.print(f"{count:>10} {action:<8} {escape(reason)}", highlight=False)
    if len(reasons) > _REASONS:
        screen.print(f"           and {len(reasons) - _REASONS} other reasons", highlight=False)
    if not reasons:
        screen.print("  nothing is selected")
    _show_items(screen, read_items(database, replay.replay_id, limit=items))
    if replay.state == "planned" and replay.items:
        screen.print(f"run it with: clarion replay run {replay.replay_id[:8]}", highlight=False)


def _show_items(screen: Console, items: list[dict[str, Any]]) -> None:
    if not items:
        return
    table = Table(box=None)
    for column in ("", "state", "action", "study", "pipeline", "to", "why"):
        table.add_column(column, overflow="fold")
    for one in items:
        why = one["note"] or one["reason"]
        uid = f"…{one['study_uid'][-14:]}"
        table.add_row(
            str(one["number"]), one["state"], one["action"], uid, one["pipeline_id"], one["destination"], escape(why)
        )
    screen.print(table)


def show_list(found: list[Replay]) -> None:
    """Print replays for a person."""
    screen = Console()
    table = Table(box=None)
    for column in ("id", "state", "mode", "created", "by", "items", "why"):
        table.add_column(column, overflow="fold")
    for one in found:
        done = one.counts.get("done", 0) + one.counts.get("failed", 0)
        table.add_row(
            one.replay_id[:8], one.state, one.mode, one.created[:19], one.planned_by, f"{done}/{one.items}",
            escape(one.reason),
        )  # fmt: skip
    screen.print(table)
