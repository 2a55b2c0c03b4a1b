"""`clarion echo` and `clarion send`: a C-ECHO and a C-STORE by hand, to us or to anybody."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated

import typer

from console.command import AsJson, print_json, run

if TYPE_CHECKING:
    from clarion.model import Destination

Peer = Annotated[str, typer.Argument(metavar="AE@HOST:PORT", help="The peer, for instance CHEST@127.0.0.1:11112.")]
Calling = Annotated[str, typer.Option("--calling", "-a", help="Our own AE title: one that the peer knows.")]


def echo(peer: Peer, calling: Calling = "CLARION", as_json: AsJson = False) -> None:
    """Ask a peer for a C-ECHO; exit status 3 if it cannot be reached now, 1 if it refuses us for good."""

    def body() -> int:
        import time  # noqa: PLC0415  quick --help

        from gateway.scu import Requestor, Timeouts  # noqa: PLC0415  quick --help

        begun = time.monotonic()
        with Requestor(_peer_of(peer), own_ae=calling, timeouts=Timeouts(connect_s=10, dimse_s=10)) as requestor:
            status = requestor.echo()
        seconds = round(time.monotonic() - begun, 4)
        if as_json:
            print_json({"peer": peer, "status": f"0x{status:04X}", "seconds": seconds})
        else:
            typer.echo(f"{peer} answers 0x{status:04X} after {1000 * seconds:.0f} ms, association included")
        return 0 if status == 0 else 1

    run(body)


def send(
    folder: Annotated[Path, typer.Argument(help="A folder of DICOM files, or one file.", exists=True)],
    peer: Peer,
    calling: Calling = "CLARION",
    ledger: Annotated[
        Path | None, typer.Option(help="Append the SOP Instance UIDs that were acknowledged to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send DICOM files by C-STORE as they are; exit status 1 if one was refused, or is no DICOM file."""

    def body() -> int:
        from rich.console import Console  # noqa: PLC0415  quick --help
        from rich.progress import Progress  # noqa: PLC0415  as above

        from console.sending import send_folder  # noqa: PLC0415  as above

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("sending", total=None)
            sent = send_folder(
                folder,
                _peer_of(peer),
                own_ae=calling,
                progress=lambda done, all_: bar.update(task, completed=done, total=all_),
            )
        if ledger is not None:
            with ledger.open("a") as file:
                file.writelines(f"{one}\n" for one in sent.acknowledged)
        refused = {uid: f"0x{status:04X}" for uid, status in sent.refused}
        if as_json:
            print_json({"acknowledged": sent.acknowledged, "refused": refused, "skipped": sent.skipped})
        else:
            typer.echo(f"{len(sent.acknowledged)} acknowledged, {len(refused)} refused, {len(sent.skipped)} skipped")
            for uid, status in refused.items():
                typer.echo(f"  refused {status} {uid}")
            for name in sent.skipped:
                typer.echo(f"  skipped {name}: not a DICOM file that can be sent")
        return 1 if refused or sent.skipped else 0

    run(body)


def _peer_of(text: str) -> Destination:
    """Read AE@HOST:PORT. Raises ConfigError."""
    from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
    from clarion.model import Destination  # noqa: PLC0415  as above

    title, at, place = text.partition("@")
    host, _, port = place.rpartition(":")
    if not at or not 1 <= len(title) <= 16 or not title.isascii() or not host or not port.isdigit():  # noqa: PLR2004  VR AE
        raise ConfigError([f"{text!r} is no peer; write AE@HOST:PORT, for instance CHEST@127.0.0.1:11112"])
    return Destination(name=title, ae_title=title, host=host.strip("[]"), port=int(port))
