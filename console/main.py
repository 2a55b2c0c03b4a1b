"""The command `clarion`. Imports are inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003  typer reads the annotations at run time
from typing import Annotated

import typer

from console.association_cli import association_cli
from console.cleanup_cli import cleanup_cli
from console.command import DEFAULT_CONFIG, AsJson, ConfigFile, print_json, reader, run
from console.delivery_cli import delivery_cli
from console.dicom_cli import echo, send
from console.events_cli import events_cli
from console.letters_cli import letters_cli
from console.load_cli import load_cli
from console.quarantine_cli import quarantine_cli
from console.replay_cli import replay_cli
from console.store_cli import store_cli
from console.topics_cli import topics_cli

cli = typer.Typer(
    name="clarion",
    help="Event-driven DICOM gateway and AI platform: studies in by C-STORE, SEG, RTSTRUCT and SR back in the PACS.\n\n"
    "Exit statuses: 0 done, 1 permanent failure, 2 usage or configuration, 3 worth repeating, 130 interrupted.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
study_cli = typer.Typer(help="Look at studies.", no_args_is_help=True)
config_cli = typer.Typer(help="Check a configuration, or print an example.", no_args_is_help=True)
cli.add_typer(study_cli, name="study")
cli.add_typer(cleanup_cli, name="cleanup")
cli.add_typer(letters_cli, name="deadletters")
cli.add_typer(association_cli, name="association")
cli.add_typer(delivery_cli, name="delivery")
cli.add_typer(load_cli, name="load")
cli.add_typer(store_cli, name="store")
cli.add_typer(topics_cli, name="topics")
cli.add_typer(events_cli, name="events")
cli.add_typer(quarantine_cli, name="quarantine")
cli.add_typer(replay_cli, name="replay")
cli.add_typer(config_cli, name="config")
cli.command()(echo)
cli.command()(send)


@cli.command()
def up(config: ConfigFile = DEFAULT_CONFIG) -> None:
    """Run every stage on this machine until SIGTERM or Ctrl-C; both drain in order."""

    def body() -> int:
        from console.checks import check_config, notes_on  # noqa: PLC0415  quick --help
        from console.logs import configure  # noqa: PLC0415  quick --help
        from console.supervisor import Supervisor  # noqa: PLC0415  quick --help
        from console.topics import require_topics  # noqa: PLC0415  quick --help

        checked = check_config(config)
        for note in notes_on(checked.config):
            typer.echo(f"clarion: note: {note}", err=True)
        typer.echo(f"clarion: starting on {checked.config.data} …", err=True)
        configure(checked.config.log, "supervisor")
        require_topics(checked.config)
        supervisor = Supervisor(checked)
        supervisor.start()
        scp, page = checked.config.gateway.scp, checked.config.console
        places = [f"SCP {scp.host}:{scp.port}"]
        places += [f"with TLS {scp.tls.host}:{scp.tls.port}"] if scp.tls is not None else []
        stow = checked.config.gateway.stow
        places += [f"STOW-RS {stow.host}:{stow.port}"] if stow is not None else []
        typer.echo(f"clarion: ready; {', '.join(places)}, page http://{page.host}:{page.port}/", err=True)
        supervisor.watch()
        supervisor.stop()
        return 0

    run(body)


@cli.command()
def serve(
    stage: Annotated[
        str, typer.Argument(help="intake, stow, grouping, streams, orchestrator, delivery, relay, console.")
    ],
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Run one stage, for deployments that start each on its own."""

    def body() -> int:
        from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
        from console.serve import serve as run  # noqa: PLC0415  quick --help
        from console.stages import RELAY, STAGES, STOW  # noqa: PLC0415  quick --help

        if stage not in (*STAGES, RELAY, STOW):
            raise ConfigError([f"no stage {stage!r}; there are: {', '.join((*STAGES, RELAY, STOW))}"])
        run(stage, config)
        return 0

    run(body)


@cli.command()
def demo(
    folder: Annotated[
        Path | None, typer.Option("--input", help="A folder with a real CT series instead of the phantom.", exists=True)
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="End by itself; status 0 only if SEG, RTSTRUCT and SR are Verified.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option("--keep", help="Keep data, log and PACS in this folder, which must be empty.")
    ] = None,
    kafka: Annotated[
        str | None, typer.Option("--kafka", metavar="HOST:PORT", help="Carry the events on this Kafka.")
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", metavar="URL", help="Keep the tables in this PostgreSQL.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send a chest CT through the whole system on this machine and show what comes back."""

    def body() -> int:
        from clarion.errors import ClarionError, ConfigError  # noqa: PLC0415  quick --help
        from console.demo import Options, run_demo  # noqa: PLC0415  quick --help

        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise ConfigError([f"--keep {keep}: is not empty; name a new folder"])
        if database is not None and not database.startswith("postgresql://"):
            raise ConfigError(["--database: is postgresql://USER:PASSWORD@HOST:PORT/NAME; without it SQLite is used"])
        options = Options(
            folder=folder,
            once=once or as_json,
            as_json=as_json,
            keep=keep.resolve() if keep else None,
            kafka=kafka,
            database=database,
        )
        try:
            status, summary = run_demo(options)
        except ClarionError as error:
            if as_json:
                print_json({"verified": False, "error": str(error)})
            raise
        if as_json:
            print_json(summary)
        return status

    run(body)


@cli.command()
def status(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Show the stages, how far each is behind, jobs and dead letters; status 3 unless every stage runs well."""

    def body() -> int:
        from console.state import read_state, show_state  # noqa: PLC0415  quick --help

        app = reader(config)
        state = read_state(app)
        if as_json:
            print_json(state)
        else:
            show_state(state)
        return 0 if state["ok"] else 3

    run(body)


@cli.command()
def doctor(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Look for what could keep this installation from working; status 1 when something is found."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from console.doctor import diagnose  # noqa: PLC0415  quick --help

        checks = diagnose(config)
        if as_json:
            print_json([asdict(one) for one in checks])
        else:
            for one in checks:
                typer.echo(f"{'ok  ' if one.good else 'FAIL'} {one.name}: {one.found}")
                if not one.good and one.remedy:
                    typer.echo(f"     → {one.remedy}")
        return 0 if all(one.good for one in checks) else 1

    run(body)


@study_cli.command("list")
def study_list(
    config: ConfigFile = DEFAULT_CONFIG,
    limit: Annotated[int, typer.Option(help="At most so many, the latest first.", min=1, max=10000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List studies with their states, the latest first."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from console.studies import read_studies  # noqa: PLC0415  quick --help

        rows = read_studies(reader(config).database, limit)
        if as_json:
            print_json([{"state": one.state, "last": one.last, **asdict(one.counts)} for one in rows])
            return 0
        for one in rows:
            counts = one.counts
            typer.echo(
                f"{one.state:<12} {counts.last_received[:19]}  {counts.modality or '-':<4} "
                f"{counts.received:>6} instances  {counts.calling_ae} → {counts.called_ae}  {counts.study_uid}"
            )
        if not rows:
            typer.echo("no studies yet", err=True)
        return 0

    run(body)


@study_cli.command("show")
def study_show(
    study_uid: Annotated[str, typer.Argument(metavar="UID", help="The Study Instance UID.")],
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Show one study: its story, its jobs, its deliveries."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from clarion.errors import PermanentError  # noqa: PLC0415  quick --help
        from console.state import show_study  # noqa: PLC0415  quick --help
        from console.studies import read_study  # noqa: PLC0415  quick --help

        app = reader(config)
        view = read_study(app.database, app.store, study_uid)
        if view is None:
            raise PermanentError(f"no study {study_uid}; `clarion study list` shows those there are")
        if as_json:
            print_json(asdict(view))
        else:
            show_study(view)
        return 0

    run(body)


@config_cli.command("check")
def config_check(
    file: Annotated[Path | None, typer.Argument(help="The configuration file.")] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    as_json: AsJson = False,
) -> None:
    """Check a configuration as a whole; every fault with file, line, key and remedy."""

    def body() -> int:
        from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
        from console.checks import check_config, notes_on  # noqa: PLC0415  quick --help

        path = file or config
        try:
            notes = notes_on(check_config(path).config)
        except ConfigError as error:
            if as_json:
                print_json({"ok": False, "faults": error.faults, "notes": []})
                return 2
            raise
        if as_json:
            print_json({"ok": True, "faults": [], "notes": notes})
            return 0
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{path}: good")
        return 0

    run(body)


@config_cli.command("example")
def config_example(as_json: AsJson = False) -> None:
    """Print a complete, commented configuration."""
    from console.example import EXAMPLE  # noqa: PLC0415  quick --help

    if as_json:
        import yaml  # noqa: PLC0415  quick --help

        print_json(yaml.safe_load(EXAMPLE))
    else:
        typer.echo(EXAMPLE, nl=False)


@cli.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    import importlib.metadata  # noqa: PLC0415  quick --help

    found = importlib.metadata.version("clarion-gateway")
    if as_json:
        print_json({"version": found, "python": sys.version.split()[0]})
    else:
        typer.echo(f"clarion {found}")


def main() -> None:
    """Run the command line."""
    cli()


if __name__ == "__main__":
    main()
