"""What `clarion status` and `clarion study show` print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from clarion.adapters.embedded import read_dead_letters, read_lag
from clarion.errors import BusUnavailableError
from clarion.service import read_heartbeats
from console.stages import STAGES
from gateway.queries import count_open_groups, list_quarantine
from orchestrator.queries import count_jobs

if TYPE_CHECKING:
    from console.app import App
    from console.studies import StudyView


def read_state(app: App) -> dict[str, Any]:
    """Read the state of the whole; a stage that has not spoken lately is down."""
    beats = {beat.stage: beat for beat in read_heartbeats(app.data / "run")}
    stages = [
        {
            "stage": name,
            "alive": name in beats and beats[name].alive,
            "pid": beats[name].pid if name in beats else None,
            **({"facts": dict(beats[name].facts)} if name in beats else {}),
        }
        for name in STAGES
    ]
    state: dict[str, Any] = {"ok": all(one["alive"] for one in stages), "stages": stages, "database": "ok"}
    try:
        state |= {
            "consumers": [asdict(one) for one in read_lag(app.database)],
            "dead_letters": len(read_dead_letters(app.database)),
            "open_groups": count_open_groups(app.database),
            "quarantined": len(list_quarantine(app.database)),
            "jobs": count_jobs(app.database),
        }
    except BusUnavailableError as error:
        state["database"] = str(error)
    return state


def show_state(state: dict[str, Any]) -> None:
    """Print the state for a person."""
    screen = Console()
    table = Table(box=None)
    for column in ("stage", "state", "pid", "facts"):
        table.add_column(column)
    for one in state["stages"]:
        facts = ", ".join(f"{key} {value}" for key, value in one.get("facts", {}).items())
        table.add_row(
            one["stage"], "[green]running[/]" if one["alive"] else "[red]down[/]", str(one["pid"] or "-"), facts
        )
    screen.print(table)
    behind = ", ".join(f"{one['consumer']} {one['behind']}" for one in state.get("consumers", [])) or "-"
    jobs = ", ".join(f"{count} {name}" for name, count in state.get("jobs", {}).items()) or "none"
    screen.print(f"behind: {behind}")
    screen.print(f"jobs: {jobs}; open groups: {state.get('open_groups', '-')}")
    screen.print(f"dead letters: {state.get('dead_letters', '-')}; in quarantine: {state.get('quarantined', '-')}")
    if state["database"] != "ok":
        screen.print(f"[red]database: {state['database']}[/]")


def show_study(view: StudyView) -> None:
    """Print a study for a person."""
    screen = Console()
    counts = view.counts
    screen.print(f"[bold]{view.state}[/]  {counts.study_uid}")
    screen.print(
        f"received {counts.received} = grouped {counts.grouped} + ignored {counts.ignored} + quarantined "
        f"{counts.quarantined}; conflicted {counts.conflicted}; {counts.series} series; "
        f"{counts.calling_ae} → {counts.called_ae}"
    )
    for line in view.story:
        screen.print(f"  {line.time[11:23]}  [bold]{line.state:<11}[/] {line.text}", highlight=False)
    for job in view.jobs:
        screen.print(f"job {job.name} ({job.job_id}): {job.state}, attempt {job.attempt} {job.reason}")
        for operator in job.operators:
            screen.print(f"  {operator.operator:<14} {operator.state} {operator.reason}")
    for one in view.deliveries:
        screen.print(f"delivery to {one.destination}: {one.state} ({one.answered}/{one.instances}) {one.reason}")
