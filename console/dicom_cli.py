"""`clarion echo` and `clarion send`: a C-ECHO and a C-STORE by hand, to us or to anybody."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from console.command import AsJson, print_json, run

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from clarion.model import Destination, TlsFiles
    from console.sending import Sent

Peer = Annotated[str, typer.Argument(metavar="AE@HOST:PORT", help="The peer, for instance CHEST@127.0.0.1:11112.")]
Tls = Annotated[bool, typer.Option("--tls", help="Speak TLS; whom to trust is the system's list, or --tls-ca.")]
TlsCa = Annotated[Path | None, typer.Option("--tls-ca", help="PEM: who vouches for the peer.", exists=True)]
TlsCert = Annotated[Path | None, typer.Option("--tls-cert", help="PEM: our certificate and key.", exists=True)]
Calling = Annotated[str, typer.Option("--calling", "-a", help="Our own AE title: one that the peer knows.")]


def echo(
    peer: Peer,
    calling: Calling = "CLARION",
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    as_json: AsJson = False,
) -> None:
    """Ask a peer for a C-ECHO; exit status 3 if it cannot be reached now, 1 if it refuses us for good."""

    def body() -> int:
        import time  # noqa: PLC0415  quick --help

        from gateway.scu import Requestor, Timeouts  # noqa: PLC0415  quick --help

        begun = time.monotonic()
        destination = _peer_of(peer, tls_files(tls, tls_ca, tls_cert))
        with Requestor(
            destination, own_ae=ae_title(calling, "--calling"), timeouts=Timeouts(connect_s=10, dimse_s=10)
        ) as requestor:
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
        Path | None, typer.Option(help="Append each SOP Instance UID to this file as it is acknowledged.")
    ] = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    as_json: AsJson = False,
) -> None:
    """Send DICOM files by C-STORE as they are; exit status 1 if one was refused, or is no DICOM file."""

    def body() -> int:
        from rich.console import Console  # noqa: PLC0415  quick --help
        from rich.progress import Progress  # noqa: PLC0415  as above

        from console.sending import Sent, send_folder  # noqa: PLC0415  as above

        destination, sent = _peer_of(peer, tls_files(tls, tls_ca, tls_cert)), Sent()
        with open_ledger(ledger) as file, Progress(
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as bar:  # fmt: skip
            task = bar.add_task("sending", total=None)

            def note(uid: str) -> None:
                if file is not None:
                    file.write(f"{uid}\n")
                    file.flush()

            try:
                send_folder(
                    folder,
                    destination,
                    own_ae=ae_title(calling, "--calling"),
                    progress=lambda done, all_: bar.update(task, completed=done, total=all_),
                    acknowledged=note,
                    sent=sent,
                )
            finally:
                _show(sent, as_json=as_json)
        return 1 if sent.refused or sent.skipped else 0

    run(body)


def open_ledger(path: Path | None) -> AbstractContextManager[TextIO | None]:
    """Open the ledger before anything is sent. Raises ConfigError."""
    from contextlib import nullcontext  # noqa: PLC0415  quick --help

    from clarion.errors import ConfigError  # noqa: PLC0415  as above

    if path is None:
        return nullcontext()
    try:
        return path.open("a")
    except OSError as error:
        raise ConfigError([f"--ledger: {path} cannot be written: {error.strerror}"]) from error


def _show(sent: Sent, *, as_json: bool) -> None:
    """Say how far it came, also when it did not come to its end."""
    if as_json:
        refused = [{**asdict(one), "status": f"0x{one.status:04X}"} for one in sent.refused]
        print_json({"acknowledged": sent.acknowledged, "refused": refused, "skipped": sent.skipped})
        return
    typer.echo(f"{len(sent.acknowledged)} acknowledged, {len(sent.refused)} refused, {len(sent.skipped)} skipped")
    for one in sent.refused:
        typer.echo(f"  refused 0x{one.status:04X} {one.file} ({one.sop_instance_uid}) {one.comment}".rstrip())
    for name in sent.skipped:
        typer.echo(f"  skipped {name}: not a DICOM file that can be sent")


def ae_title(text: str, where: str) -> str:
    """Check an AE title. Raises ConfigError."""
    from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
    from clarion.fields import check_ae_title  # noqa: PLC0415  as above

    try:
        return check_ae_title(text)
    except ValueError as error:
        raise ConfigError([f"{where}: {text!r}: {error}"]) from error


def tls_files(wanted: bool, trusted: Path | None, certificate: Path | None) -> TlsFiles | None:  # noqa: FBT001  as given
    """Read the options of TLS; one of them is enough."""
    from clarion.model import TlsFiles  # noqa: PLC0415  quick --help

    if not wanted and trusted is None and certificate is None:
        return None
    return TlsFiles(trusted=trusted, certificate=certificate, key=certificate)


def _peer_of(text: str, tls: TlsFiles | None = None) -> Destination:
    """Read AE@HOST:PORT. Raises ConfigError."""
    from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
    from clarion.model import Destination  # noqa: PLC0415  as above

    title, at, place = text.partition("@")
    host, _, port = place.rpartition(":")
    if not at or not host or not port.isdigit() or not 0 < int(port) < 65536:  # noqa: PLR2004  ports
        raise ConfigError([f"{text!r} is no peer; write AE@HOST:PORT, for instance CHEST@127.0.0.1:11112"])
    title = ae_title(title, "the peer")
    return Destination(name=title, ae_title=title, host=host.strip("[]"), port=int(port), tls=tls)
