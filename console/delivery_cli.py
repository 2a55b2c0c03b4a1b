"""`clarion delivery`: look at deliveries, send now what could not be sent."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

if TYPE_CHECKING:
    from console.app import App
    from gateway.queries import DeliveryRow

delivery_cli = typer.Typer(help="Look at deliveries, and take up those that failed.", no_args_is_help=True)


class DeliveryState(enum.StrEnum):
    """States of a delivery, as `gateway.outbound` has them."""

    WAITING = "waiting"
    SENT = "sent"
    VERIFIED = "verified"
    UNVERIFIED = "unverified"
    FAILED = "failed"
    SUPERSEDED = "superseded"


@delivery_cli.command("list")
def delivery_list(
    config: ConfigFile = DEFAULT_CONFIG,
    state: Annotated[list[DeliveryState] | None, typer.Option(help="Only deliveries in this state.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the latest first.", min=1, max=10000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, the latest first: asked for when (UTC), of which study, and why they stand where they do."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from gateway.queries import list_deliveries  # noqa: PLC0415  quick --help

        app = reader(config)
        rows = list_deliveries(app.database, states=state or (), limit=limit)
        if as_json:
            print_json([asdict(one) for one in rows])
            return 0
        for one in rows:
            counted = f"{one.answered}/{one.instances}"
            again = f"{_when(app, one)}; " if one.due else ""
            typer.echo(
                f"{one.requested[:19]}  {one.state:<11} {one.destination:<16} {counted:>7}  {one.delivery_id}  "
                f"study {one.study_uid}  {again}{one.reason}"
            )
        if not rows:
            typer.echo("no deliveries", err=True)
        return 0

    run(body)


def _when(app: App, one: DeliveryRow) -> str:
    """Say when a delivery that waits is sent: its own time, or that of its destination."""
    from clarion.service import read_heartbeats  # noqa: PLC0415  quick --help
    from gateway.outbound import BY_A_PERSON  # noqa: PLC0415  as above

    facts = next((beat.facts for beat in read_heartbeats(app.data / "run") if beat.stage == "delivery"), {})
    windows, unreached = facts.get("destinations_waiting"), facts.get("destinations_unreached")
    if isinstance(windows, dict) and one.destination in windows and one.reason != BY_A_PERSON:
        return f"waits for its window, {windows[one.destination]}"
    if isinstance(unreached, dict) and one.destination.lower() in unreached:
        return f"cannot be reached, tried again at {unreached[one.destination.lower()][:19]}"
    return f"again at {one.due[:19]}"


@delivery_cli.command("retry")
def delivery_retry(
    delivery_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids, as `clarion delivery list` shows them.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    failed: Annotated[bool, typer.Option("--failed", help="Take up every delivery that failed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be taken up.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send now, outside its windows too and with a new budget, what waits, failed, stayed unverified or was superseded.

    What was stored of a failed one is not sent again; an unverified one, of which nothing can be proved, is sent whole.
    """

    def body() -> int:
        from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
        from gateway.outbound import RETRYABLE, Outbound  # noqa: PLC0415  quick --help
        from gateway.queries import list_deliveries  # noqa: PLC0415  quick --help

        if bool(delivery_ids) == failed:
            raise ConfigError(["name deliveries by id, or say --failed for all that failed"])
        app = reader(config)
        states = ("failed",) if failed else RETRYABLE
        there = [one.delivery_id for one in list_deliveries(app.database, states=states, limit=100_000)]
        wanted = there if failed else [one for one in delivery_ids or () if one in there]
        taken = wanted if dry_run else Outbound(app.database).retry(wanted, app.clock.now())
        passed_over = sorted(set(delivery_ids or ()) - set(taken))
        if as_json:
            print_json({"dry_run": dry_run, "taken_up": taken, "passed_over": passed_over})
        else:
            typer.echo(f"{len(taken)} deliveries {'would be' if dry_run else ''} taken up".replace("  ", " "))
            for one in passed_over:
                typer.echo(
                    f"{one}: no delivery of this id that could be sent: it is on its way, verified or unknown", err=True
                )
        return 1 if passed_over else 0

    run(body)
