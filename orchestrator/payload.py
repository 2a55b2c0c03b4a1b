"""A job's folders: the payload as Part 10 files, digests verified; what is an input is read-only; removal."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from typing import TYPE_CHECKING

from clarion.attributes import read_attributes
from clarion.crashpoints import effect
from clarion.dicom import part10
from clarion.model import Manifest, is_uid

if TYPE_CHECKING:
    from pathlib import Path

    from clarion.model import ManifestEntry, ObjectRef
    from clarion.ports import ObjectStore


_PATIENT_ID = "00100020"


def _safe(uid: str) -> str:
    """Give a file name: the UID itself if it is made like one, else a hash of it. Never wire text as a path."""
    return uid if is_uid(uid) else hashlib.sha256(uid.encode()).hexdigest()[:32]


def seal(folder: Path) -> None:
    """Make a folder and all that is in it read-only: inputs are looked at, never changed."""
    for path in (*folder.rglob("*"), folder):
        if path.exists() and not path.is_symlink():
            path.chmod(0o500 if path.is_dir() else 0o400)


def remove(folder: Path) -> None:
    """Remove a folder, sealed or not; what cannot be removed stays."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def materialise(store: ObjectStore, manifest: ObjectRef, folder: Path) -> int:
    """Write `dcm/<patient>/<study>/<series>/<instance>.dcm` under the folder and seal it; gives the count.

    `<patient>` is the first 16 hex digits of SHA-256(PatientID), so that a path tells nothing.

    Raises MissingObjectError and StoreUnavailableError as the store does, OSError when the folder cannot be written.
    """
    entries = Manifest.decode(store.read(manifest)).entries
    patients: dict[str, str] = {}
    with effect("payload.write"):
        for entry in entries:
            _write(store, entry, folder / "dcm", patients)
        seal(folder)
    return len(entries)


def _write(store: ObjectStore, entry: ManifestEntry, root: Path, patients: dict[str, str]) -> None:
    data = store.read(entry.object)
    if entry.study_uid not in patients:
        patient_id = read_attributes(data, entry.transfer_syntax_uid).get(_PATIENT_ID, "")
        patients[entry.study_uid] = hashlib.sha256(patient_id.encode()).hexdigest()[:16]
    place = root / patients[entry.study_uid] / _safe(entry.study_uid) / _safe(entry.series_uid)
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{_safe(entry.sop_instance_uid)}.dcm"
    path.write_bytes(
        part10(
            data,
            sop_class_uid=entry.sop_class_uid,
            sop_instance_uid=entry.sop_instance_uid,
            transfer_syntax_uid=entry.transfer_syntax_uid,
        )
    )
