"""The command `clarion`. Imports are inside the commands, so that `--help` is quick."""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from console.app import App

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
delivery_cli = typer.Typer(help="Look at deliveries, and take up those that failed.", no_args_is_help=True)
cli.add_typer(study_cli, name="study")
topics_cli = typer.Typer(help="Make and check the topics of a bus on Kafka.", no_args_is_help=True)
cli.add_typer(delivery_cli, name="delivery")
cli.add_typer(topics_cli, name="topics")
cli.add_typer(config_cli, name="config")

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The configuration file.", envvar=None)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DEFAULT_CONFIG = Path("clarion.yaml")


class DeliveryState(enum.StrEnum):
    """States of a delivery, as `gateway.outbound` has them."""

    WAITING = "waiting"
    SENT = "sent"
    VERIFIED = "verified"
    UNVERIFIED = "unverified"
    FAILED = "failed"
    SUPERSEDED = "superseded"


def _run(command: Callable[[], int]) -> None:
    """Run a command's body; errors of ours become a line on standard error and an exit status."""
    from clarion.errors import ClarionError  # noqa: PLC0415  quick --help
    from console.exits import INTERRUPTED, status_of  # noqa: PLC0415  quick --help

    # Whatever is written is the owner's alone, also below a folder that others may enter.
    os.umask(0o077)
    try:
        status = command()
    except ClarionError as error:
        typer.echo(f"clarion: {error}", err=True)
        status = status_of(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    raise typer.Exit(status)


def _print_json(value: Any) -> None:  # noqa: ANN401  anything JSON can hold
    typer.echo(json.dumps(value, indent=2, default=str))


def _reader(config: Path) -> App:
    """Make what a reading command needs. Raises ConfigError when there is no data folder yet."""
    from clarion.adapters.clock import SystemClock  # noqa: PLC0415  quick --help
    from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
    from clarion.service import open_wakeup  # noqa: PLC0415  quick --help
    from console.app import App  # noqa: PLC0415  quick --help
    from console.checks import check_config  # noqa: PLC0415  quick --help

    checked = check_config(config)
    if not (checked.config.data / "run").is_dir():
        raise ConfigError(
            [f"data: nothing has run on {checked.config.data} yet; start it with `clarion up -c {config}`"]
        )
    return App(checked=checked, wakeup=open_wakeup(checked.config.data, "reader"), clock=SystemClock())


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
        typer.echo(f"clarion: ready; SCP {scp.host}:{scp.port}, page http://{page.host}:{page.port}/", err=True)
        supervisor.watch()
        supervisor.stop()
        return 0

    _run(body)


@cli.command()
def serve(
    stage: Annotated[str, typer.Argument(help="intake, grouping, streams, orchestrator, delivery, relay or console.")],
    config: ConfigFile = DEFAULT_CONFIG,
) -> None:
    """Run one stage, for deployments that start each on its own."""

    def body() -> int:
        from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
        from console.serve import serve as run  # noqa: PLC0415  quick --help
        from console.stages import RELAY, STAGES  # noqa: PLC0415  quick --help

        if stage not in (*STAGES, RELAY):
            raise ConfigError([f"no stage {stage!r}; there are: {', '.join((*STAGES, RELAY))}"])
        run(stage, config)
        return 0

    _run(body)


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
    as_json: AsJson = False,
) -> None:
    """Send a chest CT through the whole system on this machine and show what comes back."""

    def body() -> int:
        from clarion.errors import ClarionError, ConfigError  # noqa: PLC0415  quick --help
        from console.demo import Options, run_demo  # noqa: PLC0415  quick --help

        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise ConfigError([f"--keep {keep}: is not empty; name a new folder"])
        options = Options(
            folder=folder,
            once=once or as_json,
            as_json=as_json,
            keep=keep.resolve() if keep else None,
            kafka=kafka,
        )
        try:
            status, summary = run_demo(options)
        except ClarionError as error:
            if as_json:
                _print_json({"verified": False, "error": str(error)})
            raise
        if as_json:
            _print_json(summary)
        return status

    _run(body)


@cli.command()
def status(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Show the stages, how far each is behind, jobs and dead letters; status 3 unless every stage runs well."""

    def body() -> int:
        from console.state import read_state, show_state  # noqa: PLC0415  quick --help

        app = _reader(config)
        state = read_state(app)
        if as_json:
            _print_json(state)
        else:
            show_state(state)
        return 0 if state["ok"] else 3

    _run(body)


@cli.command()
def doctor(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Look for what could keep this installation from working; status 1 when something is found."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from console.doctor import diagnose  # noqa: PLC0415  quick --help

        checks = diagnose(config)
        if as_json:
            _print_json([asdict(one) for one in checks])
        else:
            for one in checks:
                typer.echo(f"{'ok  ' if one.good else 'FAIL'} {one.name}: {one.found}")
                if not one.good and one.remedy:
                    typer.echo(f"     → {one.remedy}")
        return 0 if all(one.good for one in checks) else 1

    _run(body)


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

        rows = read_studies(_reader(config).database, limit)
        if as_json:
            _print_json([{"state": one.state, "last": one.last, **asdict(one.counts)} for one in rows])
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

    _run(body)


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

        app = _reader(config)
        view = read_study(app.database, app.store, study_uid)
        if view is None:
            raise PermanentError(f"no study {study_uid}; `clarion study list` shows those there are")
        if as_json:
            _print_json(asdict(view))
        else:
            show_study(view)
        return 0

    _run(body)


@delivery_cli.command("list")
def delivery_list(
    config: ConfigFile = DEFAULT_CONFIG,
    state: Annotated[list[DeliveryState] | None, typer.Option(help="Only deliveries in this state.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the latest first.", min=1, max=10000)] = 50,
    as_json: AsJson = False,
) -> None:
    """List deliveries, the latest first, with why they stand where they do."""

    def body() -> int:
        from dataclasses import asdict  # noqa: PLC0415  quick --help

        from gateway.queries import list_deliveries  # noqa: PLC0415  quick --help

        rows = list_deliveries(_reader(config).database, states=state or (), limit=limit)
        if as_json:
            _print_json([asdict(one) for one in rows])
            return 0
        for one in rows:
            counted = f"{one.answered}/{one.instances}"
            again = f"again at {one.due[:19]}; " if one.due else ""
            typer.echo(f"{one.state:<11} {one.destination:<16} {counted:>7}  {one.delivery_id}  {again}{one.reason}")
        if not rows:
            typer.echo("no deliveries", err=True)
        return 0

    _run(body)


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
    """Send now, with a new budget, what waits, failed, stayed unverified or was superseded.

    What was stored of a failed one is not sent again; an unverified one, of which nothing can be proved, is sent whole.
    """

    def body() -> int:
        from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
        from gateway.outbound import RETRYABLE, Outbound  # noqa: PLC0415  quick --help
        from gateway.queries import list_deliveries  # noqa: PLC0415  quick --help

        if bool(delivery_ids) == failed:
            raise ConfigError(["name deliveries by id, or say --failed for all that failed"])
        app = _reader(config)
        states = ("failed",) if failed else RETRYABLE
        there = [one.delivery_id for one in list_deliveries(app.database, states=states, limit=100_000)]
        wanted = there if failed else [one for one in delivery_ids or () if one in there]
        taken = wanted if dry_run else Outbound(app.database).retry(wanted, app.clock.now())
        passed_over = sorted(set(delivery_ids or ()) - set(taken))
        if as_json:
            _print_json({"dry_run": dry_run, "taken_up": taken, "passed_over": passed_over})
        else:
            typer.echo(f"{len(taken)} deliveries {'would be' if dry_run else ''} taken up".replace("  ", " "))
            for one in passed_over:
                typer.echo(
                    f"{one}: no delivery of this id that could be sent: it is on its way, verified or unknown", err=True
                )
        return 1 if passed_over else 0

    _run(body)


@topics_cli.command("apply")
def topics_apply(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Make the topics that are missing, and mend those that are not as configured; partitions are only ever added."""

    def body() -> int:
        from clarion.adapters.kafka_topics import apply_topics  # noqa: PLC0415  quick --help
        from console.checks import check_config  # noqa: PLC0415  quick --help
        from console.topics import kafka_of  # noqa: PLC0415  quick --help

        done = apply_topics(kafka_of(check_config(config).config))
        if as_json:
            _print_json({"done": done})
        else:
            typer.echo("\n".join(done) or "all topics are as configured")
        return 0

    _run(body)


@topics_cli.command("check")
def topics_check(config: ConfigFile = DEFAULT_CONFIG, as_json: AsJson = False) -> None:
    """Say which topics are missing or not as configured; status 1 when any is."""

    def body() -> int:
        from clarion.adapters.kafka_topics import check_topics  # noqa: PLC0415  quick --help
        from console.checks import check_config  # noqa: PLC0415  quick --help
        from console.topics import kafka_of  # noqa: PLC0415  quick --help

        faults = check_topics(kafka_of(check_config(config).config))
        if as_json:
            _print_json({"ok": not faults, "faults": faults})
        else:
            typer.echo("\n".join(faults) or "all topics are as configured")
        return 1 if faults else 0

    _run(body)


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
                _print_json({"ok": False, "faults": error.faults, "notes": []})
                return 2
            raise
        if as_json:
            _print_json({"ok": True, "faults": [], "notes": notes})
            return 0
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{path}: good")
        return 0

    _run(body)


@config_cli.command("example")
def config_example(as_json: AsJson = False) -> None:
    """Print a complete, commented configuration."""
    from console.example import EXAMPLE  # noqa: PLC0415  quick --help

    if as_json:
        import yaml  # noqa: PLC0415  quick --help

        _print_json(yaml.safe_load(EXAMPLE))
    else:
        typer.echo(EXAMPLE, nl=False)


@cli.command()
def version(as_json: AsJson = False) -> None:
    """Print the version."""
    import importlib.metadata  # noqa: PLC0415  quick --help

    found = importlib.metadata.version("clarion-gateway")
    if as_json:
        _print_json({"version": found, "python": sys.version.split()[0]})
    else:
        typer.echo(f"clarion {found}")


def main() -> None:
    """Run the command line."""
    cli()


if __name__ == "__main__":
    main()
