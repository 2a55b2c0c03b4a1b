"""`clarion events`: what has been said, what waits, and the document that describes it."""

from __future__ import annotations

from typing import Annotated

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

events_cli = typer.Typer(
    help="Look at the events: what was said, what waits. UIDs are shortened.", no_args_is_help=True
)

Unmask = Annotated[bool, typer.Option("--unmask", help="Show UIDs whole.")]


@events_cli.command("tail")
def events_tail(
    config: ConfigFile = DEFAULT_CONFIG,
    study: Annotated[str | None, typer.Option(help="About this study, its groups, jobs and deliveries.")] = None,
    group: Annotated[str | None, typer.Option(help="About this group, or any other subject.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--type", help="Of types that begin so: job., job.failed; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many of the latest.", min=1, max=100_000)] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those that come, until Ctrl-C.")] = False,
    unmask: Unmask = False,
    as_json: AsJson = False,
) -> None:
    """Show the latest events, in order; with --json one object a line."""

    def body() -> int:
        import json  # noqa: PLC0415  quick --help

        from console.event_views import describe_event, line_of, subjects, tail  # noqa: PLC0415  quick --help

        database = reader(config).database
        tail(
            database,
            limit,
            about=lambda: subjects(database, study, group),
            kinds=kind or (),
            follow=follow,
            say=lambda row: typer.echo(
                json.dumps(describe_event(row, unmask=unmask)) if as_json else line_of(row, unmask=unmask)
            ),
        )
        return 0

    run(body)


@events_cli.command("show")
def events_show(
    event_id: Annotated[str, typer.Argument(metavar="ID", help="An event's id, or its beginning.")],
    config: ConfigFile = DEFAULT_CONFIG,
    unmask: Unmask = False,
    as_json: AsJson = False,
) -> None:
    """Show one event: where it lies, its trace, its body."""

    def body() -> int:
        from console.event_views import show_event  # noqa: PLC0415  quick --help

        found = show_event(reader(config).database, event_id, unmask=unmask)
        if as_json:
            print_json(found)
            return 0
        for name, value in {**found, **found["body"]}.items():
            if name != "body":
                typer.echo(f"{name:<16} {value}")
        return 0

    run(body)


@events_cli.command("stats")
def events_stats(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Count events by type; say which handlers are behind, what waits for Kafka, and dead letters by reason."""

    def body() -> int:
        from console.event_views import read_statistics, show_statistics  # noqa: PLC0415  quick --help

        app = reader(config)
        found = read_statistics(app.checked.config, app.database)
        if as_json:
            print_json(found)
        else:
            show_statistics(found)
        return 0 if found["broker"] == "ok" else 3

    run(body)


@events_cli.command("schema")
def events_schema(
    prefix: Annotated[str, typer.Option(help="The prefix of the topics, `bus.kafka.prefix`.")] = "clarion",
    as_json: AsJson = False,
) -> None:
    """Print the AsyncAPI document of the topics: channels, keys, headers, and the JSON Schema of every event."""
    from console.asyncapi import make_document  # noqa: PLC0415  quick --help

    del as_json  # it is JSON in any case
    print_json(make_document(prefix))
