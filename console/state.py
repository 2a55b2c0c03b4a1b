"""What `clarion status` and `clarion study show` print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clarion.adapters.deadletters import count_dead_letters, read_dead_letters
from clarion.errors import BusUnavailableError
from console.carriage import read_lag, read_relay
from console.stages import read_stages
from gateway.queries import count_deliveries, count_open_groups, count_quarantine, list_blocked_groups
from orchestrator.queries import count_jobs

if TYPE_CHECKING:
    from console.app import App
    from console.studies import StudyView

_SHOWN = 10


def read_state(app: App) -> dict[str, Any]:
    """Read the state of the whole; it is not ok while a stage is down, in trouble or behind."""
    stages = read_stages(app.checked.config)
    state: dict[str, Any] = {
        "ok": all(one["state"] == "running" for one in stages),
        "stages": stages,
        "database": "ok",
    }
    try:
        state |= {
            "consumers": [asdict(one) for one in read_lag(app.checked.config, app.database)],
            "relay": read_relay(app.checked.config, app.database),
            "dead_letters": count_dead_letters(app.database),
            "latest_dead_letters": [asdict(one) for one in read_dead_letters(app.database, _SHOWN)],
            "open_groups": count_open_groups(app.database),
            "blocked_groups": [asdict(one) for one in list_blocked_groups(app.database, _SHOWN)],
            "quarantined": count_quarantine(app.database),
            "jobs": count_jobs(app.database),
            "deliveries": count_deliveries(app.database),
        }
    except BusUnavailableError as error:
        state |= {"database": str(error), "ok": False}  # or the broker: the text says which
    return state


def show_state(state: dict[str, Any]) -> None:
    """Print the state for a person."""
    screen = Console()
    table = Table(box=None)
    for column in ("stage", "state", "pid", "facts"):
        table.add_column(column)
    for one in state["stages"]:
        shown = {key: value for key, value in one.get("facts", {}).items() if value not in ("", {}, [], None)}
        shown.pop("peers", None)  # in a table of its own
        facts = "; ".join(_fact(key, value) for key, value in shown.items())
        colour = {"running": "green", "behind": "yellow"}.get(one["state"], "red")
        said = f"[{colour}]{one['state']}[/]"
        table.add_row(one["stage"], said, str(one["pid"] or "-"), escape(one["trouble"] or facts))
    screen.print(table)
    _show_peers(screen, state["stages"])
    late = [f"{one['consumer']} {one['behind']}" for one in state.get("consumers", []) if one["behind"]]
    behind = f"{', '.join(late)} events" if late else "nobody"
    jobs = ", ".join(f"{count} {name}" for name, count in state.get("jobs", {}).items()) or "none"
    screen.print(f"behind: {behind}")
    relay = state.get("relay")
    if relay and relay["backlog"]:
        screen.print(f"not in Kafka yet: {relay['backlog']} events, the oldest since {relay['oldest_seconds']:.0f} s")
    screen.print(f"jobs: {jobs}; open groups: {state.get('open_groups', '-')}")
    deliveries = ", ".join(f"{count} {name}" for name, count in state.get("deliveries", {}).items()) or "none"
    screen.print(f"deliveries: {deliveries} (clarion delivery list)")
    screen.print(f"in quarantine: {state.get('quarantined', '-')}; dead letters: {state.get('dead_letters', '-')}")
    for one in state.get("latest_dead_letters", []):
        screen.print(
            f"  [red]dead letter[/] {one['time'][:19]} {one['consumer']} {one['kind']}: {escape(one['reason'])}"
        )
    for one in state.get("blocked_groups", []):
        screen.print(
            f"  [red]group waits[/] since {one['last_received'][:19]} {one['called_ae']} {one['rule']}: {one['reason']}"
        )
    if state["database"] != "ok":
        screen.print(f"[red]database: {escape(state['database'])}[/]")


def _show_peers(screen: Console, stages: list[dict[str, Any]]) -> None:
    """Print what each calling AE title sent since receiving was started."""
    table = Table("peer", "associations", "stored", "refused", "bytes", box=None)
    for one in stages:
        for title, counts in (one.get("facts", {}).get("peers") or {}).items():
            table.add_row(escape(title), *(f"{count:,}" for count in counts.values()))
    if table.row_count:
        screen.print(table)


def _fact(key: str, value: object) -> str:
    """Say a fact of a stage in words."""
    if isinstance(value, dict):
        value = ", ".join(f"{name} {count}" for name, count in value.items())
    elif isinstance(value, list):
        value = ", ".join(str(one) for one in value)
    return f"{key.replace('_', ' ')} {value}"


def show_study(view: StudyView) -> None:
    """Print a study for a person."""
    screen = Console()
    counts = view.counts
    screen.print(f"[bold]{view.state}[/]  {counts.study_uid}")
    screen.print(
        f"received {counts.received} = grouped {counts.grouped} + ignored {counts.ignored} + quarantined "
        f"{counts.quarantined}; conflicted {counts.conflicted}; removed by retention {counts.removed}; "
        f"{counts.series} series; {counts.calling_ae} → {counts.called_ae}"
    )
    for line in view.story:
        screen.print(f"  {line.time[11:23]}  [bold]{line.state:<11}[/] {escape(line.text)}", highlight=False)
    for job in view.jobs:
        screen.print(
            f"job {job.name} ({job.job_id}), priority {job.priority}: {job.state}, attempt {job.attempt} "
            f"{escape(job.reason)}"
        )
        for operator in job.operators:
            screen.print(f"  {operator.operator:<14} {operator.state} {escape(operator.reason)}")
    for one in view.deliveries:
        screen.print(
            f"delivery to {one.destination} ({one.delivery_id}): {one.state} ({one.answered}/{one.instances}) "
            f"{escape(one.reason)}"
        )
    for letter in view.dead_letters:
        screen.print(f"[red]dead letter[/] {letter.consumer} {letter.kind}: {escape(letter.reason)}")
