"""`clarion load studies`: put a load on a receiver, ours or another, and keep the list of what it acknowledged."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003  typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.command import AsJson, print_json, run
from console.dicom_cli import Tls, TlsCa, TlsCert  # noqa: TC001  as above

if TYPE_CHECKING:
    from console.loading_studies import Outcome

load_cli = typer.Typer(help="Put a load on a receiver.", no_args_is_help=True)

_REFUSED, _UNREACHED = 1, 3


@load_cli.command("studies")
def load_studies(  # noqa: PLR0913, PLR0917  options of a command line, each by its name
    folder: Annotated[Path, typer.Argument(help="A folder of DICOM files, or one file.", exists=True)],
    ae: Annotated[str, typer.Option("--ae", "-a", help="The called AE title.")],
    host: Annotated[str, typer.Option(help="The peer's host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The peer's port.", min=1, max=65535)] = 11112,
    calling: Annotated[str, typer.Option(help="Our own AE title: one that the peer knows.")] = "CLARION",
    associations: Annotated[int, typer.Option(min=1, max=256, help="So many at once.")] = 1,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Instances a second over all; else as many as go.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="So many times; from the second, new UIDs.")] = 1,
    duplicate: Annotated[bool, typer.Option("--duplicate", help="Send each instance twice.")] = False,
    reorder: Annotated[bool, typer.Option("--reorder", help="Send in a random order.")] = False,
    seed: Annotated[int | None, typer.Option(help="Fixes the random order and the new UIDs.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="Append SOP Instance UID and digest of what is acknowledged to this file.")
    ] = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    as_json: AsJson = False,
) -> None:
    """Send studies; exit status 0 only if all was acknowledged, 1 if something was refused, 3 if the peer went away.

    Ctrl-C ends it and says how many were not sent.
    """

    def body() -> int:
        from rich.console import Console  # noqa: PLC0415  quick --help
        from rich.progress import Progress  # noqa: PLC0415  as above

        from clarion.model import Destination  # noqa: PLC0415  as above
        from console.dicom_cli import ae_title, open_ledger, tls_files  # noqa: PLC0415  as above
        from console.loading_studies import Order, StudyLoad  # noqa: PLC0415  as above

        title = ae_title(ae, "--ae")
        files = tls_files(tls, tls_ca, tls_cert)
        peer = Destination(name=title, ae_title=title, host=host, port=port, tls=files)
        order = Order(
            associations=associations, passes=count, rate=rate, duplicate=duplicate, reorder=reorder, seed=seed
        )
        with open_ledger(ledger) as file, Progress(
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as bar:  # fmt: skip
            task = bar.add_task("sending", total=None)

            def note(uid: str, digest: str) -> None:
                if file is not None:
                    file.write(f"{uid} {digest}\n")
                    file.flush()

            load = StudyLoad(
                folder,
                peer,
                order,
                own_ae=ae_title(calling, "--calling"),
                acknowledged=note,
                progress=lambda now: bar.update(task, completed=now.planned - now.pending, total=now.planned),
            )
            try:
                load.run()
            finally:
                _show(load.outcome, as_json=as_json)
        return _status(load.outcome)

    run(body)


def _status(outcome: Outcome) -> int:
    if outcome.pending and not outcome.refused_for_good:
        return _UNREACHED
    if outcome.pending:
        return _REFUSED
    return _REFUSED if outcome.refused else 0


def _show(outcome: Outcome, *, as_json: bool) -> None:
    said = _described(outcome)
    if as_json:
        print_json(said)
        return
    typer.echo(
        f"{said['acknowledged']} of {said['planned']} acknowledged, {said['pending']} pending, "
        f"{said['instances_per_second']:,.1f} instances/s, {said['megabytes_per_second']:,.1f} MB/s"
    )
    if outcome.latencies:
        typer.echo("response: " + ", ".join(f"{name} {value} ms" for name, value in said["response_ms"].items()))
    for status, number in said["refused"].items():
        typer.echo(f"  {number} refused {status}")
    for name in said["skipped"]:
        typer.echo(f"  skipped {name}: not a DICOM file that can be sent")
    if said["trouble"]:
        typer.echo(f"clarion: {said['trouble']}", err=True)


def _described(outcome: Outcome) -> dict[str, Any]:
    from console.loading_studies import percentile  # noqa: PLC0415  quick --help

    seconds = max(outcome.seconds, 1e-9)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {
        "planned": outcome.planned,
        "acknowledged": outcome.acknowledged,
        "refused": {f"0x{status:04X}": number for status, number in outcome.refused.items()},
        "pending": outcome.pending,
        "seconds": round(outcome.seconds, 3),
        "instances_per_second": round(len(outcome.latencies) / seconds, 1),
        "megabytes_per_second": round(outcome.size_bytes / 1e6 / seconds, 1),
        "response_ms": {name: round(1000 * percentile(outcome.latencies, one), 2) for name, one in shares.items()},
        "skipped": outcome.skipped,
        "trouble": outcome.trouble,
    }
