"""Send a folder of DICOM files by C-STORE and keep the sender's own list of what was acknowledged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clarion.dicom import read_header, split_part10
from clarion.errors import InvalidInstanceError, UnreadableSeriesError
from clarion.model import is_uid
from gateway.proposals import share_out
from gateway.scu import Requestor, Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clarion.model import Destination

_TIMEOUTS = Timeouts(connect_s=10, dimse_s=60)
_SUCCESS = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A file that was refused, and with which status."""

    file: str
    sop_instance_uid: str
    status: int
    comment: str


@dataclass(slots=True)
class Sent:
    """The sender's ledger."""

    acknowledged: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    studies: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class File:
    """A file that can be sent."""

    path: Path
    sop_class: str
    sop_instance: str
    syntax: str


def send_folder(
    folder: Path,
    peer: Destination,
    *,
    own_ae: str,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    acknowledged: Callable[[str], None] = lambda _uid: None,
    sent: Sent | None = None,
) -> Sent:
    """Send every DICOM file below a folder, on as few associations as can be; what is not DICOM is named as skipped.

    `acknowledged` is told at each success; `sent` is filled as it goes, for who wants it when this raises.
    """
    files, found = look_through(folder)
    sent = sent if sent is not None else Sent()
    sent.skipped, sent.studies = found.skipped, found.studies
    done = 0
    for part in share_out(files, lambda one: [(one.sop_class, one.syntax)]):
        classes = {(one.sop_class, one.syntax) for one in part}
        with Requestor(peer, own_ae=own_ae, classes=classes, timeouts=_TIMEOUTS) as requestor:
            for one in part:
                _send_one(requestor, one, folder, sent, acknowledged)
                done += 1
                progress(done, len(files))
    return sent


def _send_one(requestor: Requestor, one: File, folder: Path, sent: Sent, acknowledged: Callable[[str], None]) -> None:
    data, _ = split_part10(one.path.read_bytes())
    status = requestor.store(data, sop_class=one.sop_class, sop_instance=one.sop_instance, syntax=one.syntax)
    if status == _SUCCESS:
        sent.acknowledged.append(one.sop_instance)
        acknowledged(one.sop_instance)
    else:
        name = str(one.path.relative_to(folder)) if folder.is_dir() else one.path.name
        said = Refused(file=name, sop_instance_uid=one.sop_instance, status=status, comment=requestor.comment)
        sent.refused.append(said)


def look_through(folder: Path) -> tuple[list[File], Sent]:
    """Find what can be sent below a folder, or the one file; name what cannot.

    Raises UnreadableSeriesError when nothing can.
    """
    sent = Sent()
    paths = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    files = [one for path in paths if path.is_file() and (one := _look(path, sent)) is not None]
    if not files:
        raise UnreadableSeriesError("no-dicom", f"in {folder} there is no DICOM file that could be sent")
    return files, sent


def _look(path: Path, sent: Sent) -> File | None:
    try:
        data, syntax = split_part10(path.read_bytes())
    except InvalidInstanceError:
        sent.skipped.append(path.name)
        return None
    header = read_header(data, syntax)
    if not is_uid(header.sop_class_uid) or not is_uid(header.sop_instance_uid) or not is_uid(syntax):
        sent.skipped.append(path.name)
        return None
    sent.studies.add(header.study_uid)
    return File(path, header.sop_class_uid, header.sop_instance_uid, syntax)
