"""`clarion topics`: the topics of a bus on Kafka."""

from __future__ import annotations

from typing import Annotated

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

topics_cli = typer.Typer(help="Make and check the topics of a bus on Kafka.", no_args_is_help=True)


@topics_cli.command("apply")
def topics_apply(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Make the topics that are missing, and mend those that are not as configured; partitions are only ever added."""

    def body() -> int:
        from clarion.adapters.kafka_topics import apply_topics  # noqa: PLC0415  quick --help
        from console.checks import check_config  # noqa: PLC0415  quick --help
        from console.topics import kafka_of  # noqa: PLC0415  quick --help

        done = apply_topics(kafka_of(check_config(config).config))
        if as_json:
            print_json({"done": done})
        else:
            typer.echo("\n".join(done) or "all topics are as configured")
        return 0

    run(body)


@topics_cli.command("rebuild")
def topics_rebuild(
    names: Annotated[list[str] | None, typer.Argument(metavar="[TOPIC]...", help="studies, groups, jobs, ...")] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Let the relay copy topics anew from the table of events: all of them, or some; handlers bear seeing it again."""

    def body() -> int:
        from clarion.adapters.relay import ask_for_rebuild  # noqa: PLC0415  quick --help
        from clarion.adapters.topics import TOPICS  # noqa: PLC0415  quick --help
        from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
        from console.topics import kafka_of  # noqa: PLC0415  quick --help

        app = reader(config)
        prefix = kafka_of(app.checked.config).prefix
        wanted = [one.removeprefix(f"{prefix}.") for one in names or TOPICS]
        unknown = sorted(set(wanted) - set(TOPICS))
        if unknown:
            raise ConfigError([f"no topic {unknown[0]!r}; there are: {', '.join(TOPICS)}"])
        ask_for_rebuild(app.database, wanted)
        if as_json:
            print_json({"rebuilding": wanted})
        else:
            typer.echo(f"the relay copies anew: {', '.join(wanted)}; `clarion status` shows when it is done")
        return 0

    run(body)


@topics_cli.command("check")
def topics_check(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Say which topics are missing or not as configured; status 1 when any is."""

    def body() -> int:
        from clarion.adapters.kafka_topics import check_topics  # noqa: PLC0415  quick --help
        from console.checks import check_config  # noqa: PLC0415  quick --help
        from console.topics import kafka_of  # noqa: PLC0415  quick --help

        faults = check_topics(kafka_of(check_config(config).config))
        if as_json:
            print_json({"ok": not faults, "faults": faults})
        else:
            typer.echo("\n".join(faults) or "all topics are as configured")
        return 1 if faults else 0

    run(body)
