"""`clarion cleanup`: what of the received instances would be removed and when, what is held, and letting it go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

if TYPE_CHECKING:
    from datetime import datetime

    from gateway.removal_plan import KeptGroup, Plan

cleanup_cli = typer.Typer(
    help="See how long received instances are kept, and let go what is held.", no_args_is_help=True
)


_LOOSE = {
    "ignored-retention": "no rule took them",
    "conflict-retention": "they contradict others of the same UID",
    "quarantine-retention": "in quarantine",
}


@cleanup_cli.command("plan")
def cleanup_plan(
    config: ConfigFile = DEFAULT_CONFIG,
    days: Annotated[float, typer.Option(help="What would be gone in so many days.", min=0, max=36500)] = 0.0,
    limit: Annotated[
        int, typer.Option(help="Show at most so many groups of each kind; JSON has all.", min=1, max=100_000)
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """List what would be removed now, or in some days, and why; then what has to be kept, and why. Removes nothing."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help
        from datetime import timedelta  # noqa: PLC0415  as above

        from gateway.removal_plan import plan  # noqa: PLC0415  as above
        from gateway.retention import policy_of  # noqa: PLC0415  as above

        app = reader(config)
        now = app.clock.now()
        found = plan(app.database, policy_of(app.checked.config.gateway), now + timedelta(days=days), now=now)
        if as_json:
            print_json({"as_of": now.isoformat(), "days": days, **_json(asdict(found))})
        else:
            _show(found, days, limit)
        return 0

    run(body)


@cleanup_cli.command("release")
def cleanup_release(
    group_id: Annotated[
        str, typer.Argument(metavar="GROUP", help="Its id, or the beginning of it, as `clarion cleanup plan` shows it.")
    ],
    reason: Annotated[str, typer.Option(help="Why; it is kept in the study's timeline. No patient data.")],
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Keep a group no longer for a job that failed or was never requested; its retention goes on as for any other."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from console.replaying import whoami  # noqa: PLC0415  as above
        from gateway.removal_plan import release  # noqa: PLC0415  as above
        from gateway.retention import policy_of  # noqa: PLC0415  as above

        app = reader(config)
        policy = policy_of(app.checked.config.gateway)
        done = release(app.database, group_id, policy, by=whoami(), reason=reason, now=app.clock.now())
        if as_json:
            print_json(_json(asdict(done)))
            return 0
        said = f"had been released by {done.released}; nothing was changed" if done.already else "released"
        typer.echo(f"{done.group_id}: {said}; its instances {_goes(done.due)}")
        return 0

    run(body)


def _show(found: Plan, days: float, limit: int) -> None:
    when = f"in {days:g} days" if days else "now"
    loose = sum(one.instances for one in found.loose)
    total = _total(found.groups, loose, sum(one.size_bytes for one in found.loose))
    typer.echo(f"would be gone {when}: {len(found.groups)} groups, {total}")
    _list(found.groups, limit)
    for one in found.loose:
        typer.echo(f"  {one.instances} instances, {_size(one.size_bytes)}: {_LOOSE[one.reason]}")
    typer.echo(f"held: {len(found.held)} groups, {_total(found.held)}")
    _list(found.held, limit)
    waiting = f"wait for their time: {len(found.waiting)} groups, {_total(found.waiting)}"
    first = min((one.due for one in found.waiting if one.due is not None), default=None)
    typer.echo(f"{waiting}; the first {_goes(first)}" if first else waiting)
    if any(one.may_be_released for one in found.held):
        typer.echo(
            "clarion: a failed job is taken up by `clarion replay`; `clarion cleanup release GROUP --reason TEXT` lets "
            "its group go",
            err=True,
        )


def _total(groups: tuple[KeptGroup, ...], instances: int = 0, size: int = 0) -> str:
    instances += sum(one.instances for one in groups)
    return f"{instances} instances, {_size(size + sum(one.size_bytes for one in groups))}"


def _list(groups: tuple[KeptGroup, ...], limit: int) -> None:
    for one in groups[:limit]:
        typer.echo(
            f"  {one.group_id[:8]}  {one.called_ae:<16}  closed {one.closed[:16]}  {one.instances:>6} instances  "
            f"{_size(one.size_bytes):>9}  {_goes(one.due)}: {one.reason}; study {', '.join(one.studies)}"
        )
    if len(groups) > limit:
        typer.echo(f"  and {len(groups) - limit} more; --limit shows them")


def _json(value: Any) -> Any:  # noqa: ANN401  anything JSON can hold, and times
    """Write times as everywhere else."""
    if isinstance(value, dict):
        return {key: _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    return value.isoformat() if hasattr(value, "isoformat") else value


def _goes(due: datetime | None) -> str:
    return "stay for now" if due is None else f"go on {due:%Y-%m-%d %H:%M} UTC"


def _size(size: int) -> str:
    from rich.filesize import decimal  # noqa: PLC0415  quick --help

    return decimal(size)
