"""`clarion store check`: read every object and say which are gone or have changed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

if TYPE_CHECKING:
    from gateway.scrubbing import Damaged

store_cli = typer.Typer(help="Look after the objects that are kept.", no_args_is_help=True)


@store_cli.command("check")
def store_check(
    config: ConfigFile = DEFAULT_CONFIG,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Look for whole copies of what is damaged and put them in place; remove files that nothing refers to.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every object and compare it with its digest; exit status 1 if one is damaged and was not repaired.

    Files of receipts, older than a day, that nothing refers to are counted: a crash came before their record.
    It may run beside a running Clarion, and reads as much as is stored.
    """

    def body() -> int:
        from rich.console import Console  # noqa: PLC0415  quick --help
        from rich.progress import Progress  # noqa: PLC0415  as above

        from gateway import scrubbing  # noqa: PLC0415  as above
        from gateway.strays import find_strays  # noqa: PLC0415  as above

        app = reader(config)
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            total = scrubbing.count_referred(app.database)
            task = bar.add_task("reading", total=total)
            found = scrubbing.scrub(
                scrubbing.referred(app.database),
                app.store,
                lambda: bar.advance(task),
                lambda one: scrubbing.is_referred(app.database, one),
            )
        if repair and found:
            found = scrubbing.repair(found, app.data / "journal", app.store)
        strays = find_strays(app.database, app.store, app.data / "journal")
        if repair:
            app.store.remove_files(one.path for one in strays)
        size = sum(one.size_bytes for one in strays)
        if as_json:
            left = {"files": len(strays), "size_bytes": size, "removed": repair}
            print_json({"objects": total, "damaged": [_described(one) for one in found], "strays": left})
        else:
            _show(found, total)
            if strays:
                then = "removed" if repair else "--repair removes them"
                typer.echo(f"{len(strays)} files of {size} bytes that nothing refers to: {then}")
        return 1 if any(not one.repaired for one in found) else 0

    run(body)


def _described(one: Damaged) -> dict[str, Any]:
    return {
        "what": one.object.what,
        "name": one.object.name,
        "study_uid": one.object.study_uid,
        "digest": one.object.ref.digest,
        "place": one.object.ref.location,
        "reason": one.reason,
        "repaired": one.repaired,
    }


def _show(found: list[Damaged], total: int) -> None:
    for one in found:
        state = "repaired" if one.repaired else "DAMAGED"
        study = f" of study {one.object.study_uid}" if one.object.study_uid else ""
        typer.echo(f"{state:<8}  {one.object.what} {one.object.name}{study}: {one.reason}")
    lost = sum(not one.repaired for one in found)
    typer.echo(f"{total} objects, {lost} damaged, {len(found) - lost} repaired")
    if lost:
        typer.echo("clarion: have the study sent again, then check with --repair; results come by a replay", err=True)
