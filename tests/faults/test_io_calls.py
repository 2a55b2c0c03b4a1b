"""F05, F06: the N-th call to the disk fails, for every N; the disk is really full. Never a false success."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.raw import CT, EXPLICIT, associated, data_set
from support.scp import serving
from support.world import pause

from clarion.adapters import files, objects
from clarion.adapters.clock import SystemClock
from clarion.adapters.objects import FileStore
from clarion.config import IntakeConfig
from clarion.errors import StoreUnavailableError
from clarion.model import ObjectRef
from gateway import journal, segments
from gateway.intake import COLLECTED_BYTES, Arrival, Intake
from gateway.journal_writer import JournalWriter
from gateway.space import Space

INSTANCES = 20
# So many files of 1.5 MB are removed from the full disk: more than what is allocated ahead.
GIVEN_BACK = 8
CALLS = ("pwritev", "pwrite", "posix_fallocate", "write", "fdatasync", "fsync", "open", "rename", "replace")


class FailingOs:
    """The operating system as the product's modules see it, whose N-th call of some fails in some way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, fault: str) -> None:
        self.count, self.at, self.fault = 0, at, fault
        patched = {name: self._counted(name) for name in CALLS if hasattr(os, name)}
        fake = types.SimpleNamespace(**{**vars(os), **patched})
        for module in (segments, objects, files):
            monkeypatch.setattr(module, "os", fake)

    def _counted(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return real(*arguments, **named)
            if self.fault == "short" and name == "pwritev":
                whole = b"".join(arguments[1])
                return real(arguments[0], [whole[: max(1, len(whole) // 3)]], arguments[2])
            if self.fault == "short" and name == "pwrite":
                return real(arguments[0], arguments[1][: len(arguments[1]) // 3 // 4096 * 4096], arguments[2])
            if self.fault == "short" and name == "write":
                return real(arguments[0], bytes(arguments[1])[: max(1, len(arguments[1]) // 3)])
            if self.fault == "short":
                return real(*arguments, **named)
            raise OSError(getattr(errno, self.fault), os.strerror(getattr(errno, self.fault)))

        return call


def receive_all(root: Path) -> dict[str, bytes]:
    """Receive twenty data sets, some large, some past the page cache; give those that were told success."""
    (root / "journal" / "w0").mkdir(parents=True)
    (root / "journal" / "w0" / f"{segments.FREED}1").write_bytes(bytes(2**20))
    space = Space(root, IntakeConfig(watermark_percent=100, reserve_gb=0))
    store = FileStore(root / "objects")
    writer = JournalWriter(root / "journal" / "w0", SystemClock())
    intake = Intake(store=store, journal=writer, space=space, ignored_classes={})
    told: dict[str, bytes] = {}
    for number in range(INSTANCES):
        uid = f"1.2.{number + 1}"
        data = data_set(uid, {4: COLLECTED_BYTES + 100, 2: 100_000}.get(number % 5, 500))
        reception = intake.begin(Arrival(
            sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT, calling_ae="A", called_ae="B",
            association="x",
        ))  # fmt: skip
        for at in range(0, len(data), 300_000):
            reception.write(data[at : at + 300_000])
        if reception.finish().status == 0:
            told[uid] = data
    writer._lock_file.close()
    return told


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short"])
def test_the_nth_call_fails(fault: str, tmp_path: Path) -> None:
    """F05, for every N of the run. Bites: answer before the error of a sync is looked at."""
    for at in itertools.count(1):
        root = tmp_path / str(at)
        root.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            failing = FailingOs(patch, at, fault)
            told: dict[str, bytes] = {}
            with suppress(StoreUnavailableError, OSError):
                told = receive_all(root)
        if failing.count < at:
            assert len(told) == INSTANCES
            assert at > 2 * INSTANCES
            break
        JournalWriter(root / "journal" / "w0", SystemClock()).close()
        read = {
            one.fields["sop_instance_uid"]: one.fields
            for one in journal.read(root / "journal" / "w0", journal.START, 1000)
            if one.kind == "stored"
        }
        store = FileStore(root / "objects")
        for uid, data in told.items():
            assert store.read(ObjectRef(**read[uid]["object"])) == data, f"call {at}: {uid} was told success"
        assert list((root / "objects" / "incoming").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB in memory."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], check=False)
    if done.returncode:
        pytest.skip("no tmpfs here")
    yield folder
    subprocess.run(["/bin/umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("reserve", [0.016, 0])
def test_the_disk_is_full(reserve: float, small_disk: Path) -> None:
    """F06: refused as transient, at the watermark or by ENOSPC itself; what was told success is there; it recovers."""
    told: dict[str, bytes] = {}
    with serving(small_disk, intake={"watermark_percent": 100, "reserve_gb": reserve}) as at:
        with associated(at.port) as peer:
            statuses = []
            for number in range(120):
                uid = f"1.2.{number + 1}"
                data = data_set(uid, 1_500_000 if number % 4 == 0 else 600_000)
                statuses.append(peer.store(uid, data))
                if statuses[-1] == 0:
                    told[uid] = data
            assert set(statuses) == {0, 0xA700}
            assert statuses[-1] == 0xA700
            large = sorted((small_disk / "objects").rglob("*"), key=lambda one: one.stat().st_size)[-GIVEN_BACK:]
            moved = [one.read_bytes() for one in large]
            for one in large:
                one.unlink()
            pause(0.2)
            assert peer.store("1.3.1", data_set("1.3.1", 1000)) == 0, "it recovers by itself"
        kept = {fields["sop_instance_uid"]: fields for kind, fields in at.journalled() if kind == "stored"}
        assert set(told) <= set(kept)
        gone = 0
        for uid, data in told.items():
            if data in moved:
                gone += 1
            else:
                assert at.read(kept[uid]) == data
        assert gone == GIVEN_BACK
