"""`clarion topics`: the topics of a bus on Kafka."""

from __future__ import annotations

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, run

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
