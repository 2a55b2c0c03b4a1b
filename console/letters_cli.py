"""`clarion deadletters`: events that a handler gave up."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations at run time
from typing import Annotated, Any

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

letters_cli = typer.Typer(help="Look at events that a handler gave up; let it see them again.", no_args_is_help=True)


@letters_cli.command("list")
def letters_list(
    config: ConfigFile = DEFAULT_CONFIG,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; default: those open.")] = None,
    consumer: Annotated[str | None, typer.Option(help="Only of this handler.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the latest first.", min=1, max=100000)] = 200,
    as_json: AsJson = False,
) -> None:
    """List dead letters with their reasons, and how many there are of each."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from clarion.adapters.deadletters import PENDING, read_dead_letters  # noqa: PLC0415  quick --help
        from console.letters import show_letters  # noqa: PLC0415  quick --help

        consumers = None if consumer is None else [consumer]
        rows = read_dead_letters(reader(config).database, limit, states=state or PENDING, consumers=consumers)
        if as_json:
            print_json([asdict(one) for one in rows])
        elif rows:
            show_letters(rows)
        else:
            typer.echo("no dead letters", err=True)
        return 0

    run(body)


@letters_cli.command("show")
def letters_show(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="As `clarion deadletters list` shows it.")],
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter: why, since when, where its record lies; the body stays masked."""

    def body() -> int:
        from console.letters import describe_letter  # noqa: PLC0415  quick --help

        described = describe_letter(reader(config).database, letter_id)
        if as_json:
            print_json(described)
        else:
            for name, value in described.items():
                typer.echo(f"{name:<11} {value}")
        return 0

    run(body)


LetterIds = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="As `deadletters list` shows them.")]
Everything = Annotated[bool, typer.Option("--all", help="All but those in quarantine.")]
OfConsumer = Annotated[str | None, typer.Option("--consumer", help="All of this handler but those in quarantine.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say which.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def _put_letters(config: Path, state: str, chosen: dict[str, Any], *, dry_run: bool, yes: bool, as_json: bool) -> int:
    from clarion.adapters.deadletters import State  # noqa: PLC0415  quick --help
    from console.letters import choose, put  # noqa: PLC0415  quick --help

    database = reader(config).database
    letters = choose(database, **chosen)
    if len(letters) > 1 and not (dry_run or yes):
        typer.confirm(f"{len(letters)} dead letters: {state}?", abort=True, err=True)
    done = put(database, letters, State(state), dry_run=dry_run)
    if as_json:
        print_json(done)
    else:
        typer.echo(f"{len(done['letters'])} dead letters{' would be' if dry_run else ''}: {state}")
    return 0


@letters_cli.command("redrive")
def letters_redrive(
    letter_ids: LetterIds = None,
    config: ConfigFile = DEFAULT_CONFIG,
    everything: Everything = False,
    consumer: OfConsumer = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Let a handler see its dead letters again, once their cause is mended; after three tries one is in quarantine."""
    chosen = {"letter_ids": letter_ids or [], "everything": everything, "consumer": consumer}
    run(lambda: _put_letters(config, "redrive", chosen, dry_run=dry_run, yes=yes, as_json=as_json))


@letters_cli.command("discard")
def letters_discard(
    letter_ids: LetterIds = None,
    config: ConfigFile = DEFAULT_CONFIG,
    everything: Everything = False,
    consumer: OfConsumer = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Say that dead letters do not matter; they are kept, and no longer counted."""
    chosen = {"letter_ids": letter_ids or [], "everything": everything, "consumer": consumer}
    run(lambda: _put_letters(config, "discarded", chosen, dry_run=dry_run, yes=yes, as_json=as_json))
