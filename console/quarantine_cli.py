"""`clarion quarantine`: data sets that were set aside, why, and their bytes for whoever has to look into them."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from console.app import App
    from gateway.queries import QuarantineRow

quarantine_cli = typer.Typer(help="Look at data sets that were set aside.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="Its id, or the beginning of it, as `list` shows it.")]


@quarantine_cli.command("list")
def quarantine_list(
    config: ConfigFile = DEFAULT_CONFIG,
    study: Annotated[str | None, typer.Option(help="Only of this Study Instance UID.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the latest first.", min=1, max=100_000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List what is in quarantine, the latest first: when it came, until when it is kept, who sent it, and why."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from gateway.queries import list_quarantine  # noqa: PLC0415  quick --help

        app = reader(config)
        rows = list_quarantine(app.database, limit, study_uid=study)
        if as_json:
            print_json([{**asdict(one), "kept_until": _kept_until(app, one)} for one in rows])
            return 0
        for one in rows:
            who = f"{one.calling_ae or '-'} → {one.called_ae or '-'}"
            typer.echo(
                f"{one.quarantine_id[:8]}  {one.received[:19]}  until {_kept_until(app, one)[:10]}  {who:<35}  "
                f"{one.reason:<24}  {one.sop_instance_uid}"
            )
        if not rows:
            typer.echo(f"nothing of study {study} is in quarantine" if study else "nothing is in quarantine", err=True)
        return 0

    run(body)


@quarantine_cli.command("show")
def quarantine_show(quarantine_id: Id, config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Show one: what it said it was, who sent it, why it was set aside, whether its bytes are there."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from clarion.model import ObjectRef  # noqa: PLC0415  as above

        app = reader(config)
        row = _find(app.database, quarantine_id)
        said = {**asdict(row), "kept_until": _kept_until(app, row)}
        if as_json:
            print_json(said)
            return 0
        ref = None if row.object is None else ObjectRef(**row.object)
        whole = "none were kept" if ref is None else "there, as they came" if app.store.is_whole(ref) else "damaged"
        said = {**said, "object": "" if ref is None else f"{ref.size_bytes} bytes, {ref.digest}", "bytes": whole}
        for name, value in said.items():
            typer.echo(f"{name.replace('_', ' '):<20}{value if value is not None else '-'}")
        return 0

    run(body)


@quarantine_cli.command("export")
def quarantine_export(
    quarantine_id: Id,
    file: Annotated[Path, typer.Argument(help="Where to write it as a Part 10 file; patient data is in it.")],
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Write the bytes as they came to a file, behind file meta information, readable by its owner alone."""

    def body() -> int:
        from clarion.dicom import part10  # noqa: PLC0415  quick --help
        from clarion.errors import ConfigError, MissingObjectError  # noqa: PLC0415  as above
        from clarion.model import ObjectRef  # noqa: PLC0415  as above

        app = reader(config)
        row = _find(app.database, quarantine_id)
        if row.object is None:
            raise MissingObjectError(f"{quarantine_id}: its bytes were not kept, for there were none, or no room")
        data = app.store.read(ObjectRef(**row.object))
        whole = part10(
            data,
            sop_class_uid=row.sop_class_uid,
            sop_instance_uid=row.sop_instance_uid,
            transfer_syntax_uid=row.transfer_syntax_uid,
        )
        try:
            file.write_bytes(whole)
        except OSError as error:
            raise ConfigError([f"{file} cannot be written: {error.strerror}"]) from error
        typer.echo(f"{file}: {len(whole)} bytes, {row.reason}")
        return 0

    run(body)


def _kept_until(app: App, row: QuarantineRow) -> str:
    from gateway.retention import policy_of, quarantine_ends  # noqa: PLC0415  quick --help

    return quarantine_ends(row.received, policy_of(app.checked.config.gateway))


def _find(database: Database, quarantine_id: str) -> QuarantineRow:
    """Find one by the beginning of its id. Raises ConfigError when none or several begin so."""
    from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
    from gateway.queries import find_quarantined  # noqa: PLC0415  as above

    found = find_quarantined(database, quarantine_id)
    if len(found) != 1:
        many = "none" if not found else f"{len(found)} or more"
        raise ConfigError([f"{quarantine_id!r}: {many} in quarantine begin so; see `clarion quarantine list`"])
    return found[0]
