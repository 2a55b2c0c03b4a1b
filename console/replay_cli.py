"""`clarion replay`: choose by meaning, see the plan, run exactly that plan, with the PACS fenced off."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003  typer reads the annotations at run time
from typing import Annotated

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

replay_cli = typer.Typer(
    help="Do work again: choose by meaning, see the plan, run exactly that plan. Destinations are fenced off unless "
    "the plan names them.",
    no_args_is_help=True,
)

ReplayId = Annotated[str, typer.Argument(metavar="ID", help="As `clarion replay list` shows it, or its beginning.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Several = list[str] | None


@replay_cli.command("plan")
def replay_plan(  # noqa: PLR0913  a selection has many sides, each an option by name
    *,
    reason: Annotated[str, typer.Option(help="Why; kept with the replay.")],
    mode: Annotated[
        str,
        typer.Option(
            help="redeliver: what is not finished; failed: failed work only; rerun: everything anew, new UIDs; "
            "decide: only say what today's rules and pipelines would decide otherwise; send: results to a PACS only."
        ),
    ] = "redeliver",
    received_from: Annotated[datetime | None, typer.Option(help="Received at or after (this machine's zone).")] = None,
    received_to: Annotated[datetime | None, typer.Option(help="Received at or before.")] = None,
    study_date_from: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Study Date.")] = None,
    study_date_to: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Study Date.")] = None,
    ae_title: Annotated[Several, typer.Option(help="Calling or called AE title; may be repeated.")] = None,
    modality: Annotated[Several, typer.Option(help="Modality.")] = None,
    rule: Annotated[Several, typer.Option(help="Rule that grouped it.")] = None,
    pipeline: Annotated[Several, typer.Option(help="Pipeline id.")] = None,
    pipeline_version: Annotated[Several, typer.Option(help="Beginning of a definition's digest.")] = None,
    status: Annotated[Several, typer.Option(help="State of the study: Failed, Verified, ...")] = None,
    accession_number: Annotated[Several, typer.Option(help="Accession Number.")] = None,
    study_uid: Annotated[Several, typer.Option("--study", help="Study Instance UID.")] = None,
    where: Annotated[
        str, typer.Option(help="A CEL expression, as: modality == 'CT' && instances > 100 && status != 'Verified'")
    ] = "",
    to: Annotated[Several, typer.Option(help="A destination that results may be sent to; default: none.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Send also what the destination has proved to keep.")] = False,
    per_minute: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many items a minute.")] = 60,
    in_flight: Annotated[int, typer.Option(min=1, max=1000, help="At most so many items under way at once.")] = 4,
    budget_minutes: Annotated[float | None, typer.Option(min=0, help="Stop when jobs have taken so long.")] = None,
    stop_above: Annotated[float, typer.Option(min=0, max=100, help="Stop above so many per cent of failures.")] = 20.0,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Make a plan and show it. Nothing is done until `clarion replay run`."""

    def body() -> int:
        from console.replay_plan import PlanRequest, make_plan  # noqa: PLC0415  quick --help
        from console.replaying import describe, show, whoami  # noqa: PLC0415  quick --help
        from console.selection import Selection  # noqa: PLC0415  quick --help
        from gateway.selecting import StudyFilter  # noqa: PLC0415  quick --help
        from streams.replays import Limits, find_replay  # noqa: PLC0415  quick --help

        selection = Selection(
            studies=StudyFilter(
                received_from=_utc(received_from),
                received_to=_utc(received_to),
                study_date_from=f"{study_date_from:%Y%m%d}" if study_date_from else "",
                study_date_to=f"{study_date_to:%Y%m%d}" if study_date_to else "",
                ae_titles=tuple(ae_title or ()),
                modalities=tuple(modality or ()),
                accession_numbers=tuple(accession_number or ()),
                study_uids=tuple(study_uid or ()),
            ),
            rules=tuple(rule or ()),
            pipelines=tuple(pipeline or ()),
            versions=tuple(pipeline_version or ()),
            statuses=tuple(status or ()),
            where=where,
        )
        limits = Limits(
            per_minute=per_minute, in_flight=in_flight, budget_minutes=budget_minutes, stop_above_percent=stop_above
        )
        app = reader(config)
        request = PlanRequest(
            mode=mode,
            reason=reason,
            by=whoami(),
            selection=selection,
            destinations=tuple(to or ()),
            limits=limits,
            again=again,
        )
        replay = find_replay(app.database, make_plan(app, request))
        if as_json:
            print_json(describe(app.database, replay))
        else:
            show(app.database, replay)
        return 0

    run(body)


def _utc(time: datetime | None) -> str:
    """Give a time of this machine's zone as it is stored."""
    if time is None:
        return ""
    from datetime import UTC  # noqa: PLC0415  quick --help

    return time.astimezone(UTC).isoformat()


@replay_cli.command("list")
def replay_list(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """List replays, the latest first."""

    def body() -> int:
        from console.replaying import describe, show_list  # noqa: PLC0415  quick --help
        from streams.replays import list_replays  # noqa: PLC0415  quick --help

        database = reader(config).database
        found = list_replays(database)
        if as_json:
            print_json([describe(database, one) for one in found])
        elif found:
            show_list(found)
        else:
            typer.echo("no replays yet", err=True)
        return 0

    run(body)


@replay_cli.command("show")
def replay_show(
    replay_id: ReplayId,
    items: Annotated[int, typer.Option(help="Show so many items.", min=0, max=1_000_000)] = 20,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show a plan: what is done to which work, what is not and why; and what has become of it."""

    def body() -> int:
        from console.replaying import describe, show  # noqa: PLC0415  quick --help
        from streams.replays import find_replay, read_items  # noqa: PLC0415  quick --help

        database = reader(config).database
        replay = find_replay(database, replay_id)
        if as_json:
            print_json({**describe(database, replay), "items": read_items(database, replay.replay_id, limit=items)})
        else:
            show(database, replay, items)
        return 0

    run(body)


@replay_cli.command("status")
def replay_status(replay_id: ReplayId, config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Say how far a replay has come; status 0 when finished, 1 when it failed, 3 while it is under way."""

    def body() -> int:
        from console.replaying import describe, say_progress, status_code  # noqa: PLC0415  quick --help
        from streams.replays import find_replay  # noqa: PLC0415  quick --help

        database = reader(config).database
        replay = find_replay(database, replay_id)
        if as_json:
            print_json(describe(database, replay))
        else:
            typer.echo(say_progress(replay))
        return status_code(replay)

    run(body)


@replay_cli.command("run")
def replay_run(
    replay_id: ReplayId,
    yes: Yes = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end and show the progress.")] = False,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Run a plan on the server; it goes on when this command has ended, and after a restart."""

    def body() -> int:
        from console.replaying import ask, command_replay, describe, say_progress, status_code, watch  # noqa: PLC0415  quick --help
        from streams.replays import find_replay  # noqa: PLC0415  quick --help

        app = reader(config)
        replay = find_replay(app.database, replay_id)
        if not yes:
            ask(app.database, replay)
        replay = command_replay(app, replay, "run")
        if wait:
            replay = watch(app, replay, quiet=as_json)
        if as_json:
            print_json(describe(app.database, replay))
        else:
            typer.echo(say_progress(replay))
        return status_code(replay) if wait else 0

    run(body)


def _command(replay_id: str, verb: str, config: ConfigFile, *, as_json: bool) -> None:
    def body() -> int:
        from console.replaying import command_replay, describe, say_progress  # noqa: PLC0415  quick --help
        from streams.replays import find_replay  # noqa: PLC0415  quick --help

        app = reader(config)
        replay = command_replay(app, find_replay(app.database, replay_id), verb)
        if as_json:
            print_json(describe(app.database, replay))
        else:
            typer.echo(say_progress(replay))
        return 0

    run(body)


@replay_cli.command("pause")
def replay_pause(replay_id: ReplayId, config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Order nothing more for now; what is under way goes on to its end."""
    _command(replay_id, "pause", config, as_json=as_json)


@replay_cli.command("resume")
def replay_resume(replay_id: ReplayId, config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Go on with a replay that was paused, or that stopped itself."""
    _command(replay_id, "resume", config, as_json=as_json)


@replay_cli.command("cancel")
def replay_cancel(replay_id: ReplayId, config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Order nothing more, for good; what is under way goes on to its end."""
    _command(replay_id, "cancel", config, as_json=as_json)
