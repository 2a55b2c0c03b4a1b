"""F03: the power goes while many send; on a real file system that loses what was not synced, nothing acknowledged does.

An ext4 with a journal, in a file, mounted by loop. EXT4_IOC_SHUTDOWN without flushing ends it as a power cut does: what
is in memory only is gone, and the next mount finds what the disk had. What is acknowledged after the cut has begun does
not count, for nobody would be there to hear it: while ext4 shuts down, a sync under way can return without an error and
without having written (in 650 cuts under load twice, the acknowledgement 5 ms after the cut began). Needs root;
elsewhere the order of the system calls is proved (`test_sync.py`).
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.raw import Raw, data_set
from support.system import describe
from support.world import free_port, pause

from clarion.adapters.clock import SystemClock
from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.objects import FileStore
from clarion.config import GatewayConfig
from clarion.model import ObjectRef
from console.checks import check_config
from gateway import journal, tables
from gateway.grouping import Grouping
from gateway.journal_writer import JournalWriter
from gateway.registry import load_registry
from gateway.segments import FREED

CUTS = 20
SENDERS = 4
# What each sends at most: through the page cache, past it, and into files of their own.
_LARGEST = (60_000, 60_000, 300_000, 900_000)
_READY_BYTES = 8 * 2**20
_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
_WITHOUT_FLUSH = 2
_TITLES = [{"ae_title": "B", "settings": {"pipeline-chest": "chest-ct"}}]


class Disk:
    """A file system of its own whose power can be cut."""

    def __init__(self, root: Path) -> None:
        self.image, self.mount = root / "image", root / "mount"
        self.mount.mkdir()
        with self.image.open("wb") as file:
            file.truncate(4 * 2**30)
        run("mkfs.ext4", "-q", str(self.image))
        self.on()

    def on(self) -> None:
        run("mount", "-o", "loop", str(self.image), str(self.mount))

    def cut(self) -> None:
        folder = os.open(self.mount, os.O_RDONLY)
        fcntl.ioctl(folder, _SHUTDOWN, struct.pack("=I", _WITHOUT_FLUSH))
        os.close(folder)

    def off(self) -> None:
        for _ in range(200):
            if subprocess.run([which("umount"), str(self.mount)], capture_output=True, check=False).returncode == 0:
                return
            pause(0.05)
        raise AssertionError("the file system is still in use")


def which(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found, name
    return found


def run(name: str, *arguments: str) -> None:
    subprocess.run([which(name), *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    try:
        made = Disk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device here: {error.stderr.decode()}")
    yield made
    with suppress(AssertionError):
        made.off()


def start(config: Path, log: Path, left_out: bool) -> subprocess.Popen[bytes]:  # noqa: FBT001
    """Start the receiving stage; on wish with the product's syncs replaced by nothing."""
    serve = [sys.executable, "-P", "-m", "console.serve", "intake", str(config)]
    if left_out:
        code = (
            "import sys, types, os, gateway.segments as s, clarion.adapters.objects as o, clarion.adapters.files as f"
        )
        code += "; fake = types.SimpleNamespace(**{**vars(os), 'fdatasync': id, 'fsync': id})"
        code += "; s.os = o.os = f.os = fake; from console import serve"
        code += "; sys.argv = sys.argv[:1] + sys.argv[-2:]; sys.exit(serve.main())"
        serve = [sys.executable, "-P", "-c", code, *serve[-2:]]
    with log.open("ab") as file:
        return subprocess.Popen(serve, stdin=subprocess.DEVNULL, stderr=file, start_new_session=True)


class Senders:
    """Send until the power is gone; keep the list of what was acknowledged before."""

    def __init__(self, port: int, cut: int) -> None:
        self.acknowledged: dict[str, bytes] = {}
        self.over = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(port, f"1.2.{cut + 1}.{number + 1}", number), daemon=True)
            for number in range(SENDERS)
        ]
        for one in self._threads:
            one.start()

    def _send(self, port: int, root: str, number: int) -> None:
        rng = random.Random(root)
        with suppress(OSError, AssertionError), Raw(port) as peer:
            peer.associate()
            for count in range(100_000):
                uid = f"{root}.{count}"
                size = 1_200_000 if number == 0 and count % 5 == 0 else rng.randint(10, _LARGEST[number])
                data = data_set(uid, size, study=root)
                if peer.store(uid, data) == 0 and not self.over.is_set():
                    self.acknowledged[uid] = data

    def wait(self) -> None:
        for one in self._threads:
            one.join(30)
            assert not one.is_alive()


def make_ready(path: Path) -> None:
    """Make a segment that was used before: what is large is written into it past the page cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(_READY_BYTES))
    os.sync()


def cut_while_sending(disk: Disk, root: Path, number: int, *, left_out: bool = False) -> dict[str, bytes]:
    port = free_port()
    config = describe(
        root / f"run{number}", ae_titles=_TITLES, sources=[{"ae_title": "A", "host": "127.0.0.1"}], scp={"port": port},
        intake={"watermark_percent": 100, "reserve_gb": 0.01},
    )  # fmt: skip
    config.write_text(config.read_text().replace("data: data", f"data: {disk.mount}/data"))
    assert check_config(config).config.data == disk.mount / "data"
    for name in ("w0", "w1"):
        make_ready(disk.mount / "data" / "journal" / name / f"{FREED}{number}")
    process = start(config, root / "log", left_out)
    try:
        for _ in range(600):
            with suppress(OSError), Raw(port):
                break
            pause(0.05)
        senders = Senders(port, number)
        pause(0.3 + 0.5 * random.Random(number).random())
        senders.over.set()
        disk.cut()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    senders.wait()
    disk.off()
    disk.on()
    return senders.acknowledged


def recovered(disk: Disk) -> tuple[dict[str, list[ObjectRef]], FileStore]:
    """Start as after a power cut: writers recover their logs; give what the journal then holds."""
    folder = disk.mount / "data" / "journal"
    found: dict[str, list[ObjectRef]] = {}
    for log in journal.logs(folder):
        JournalWriter(folder / log, SystemClock()).close()
        for entry in journal.read(folder / log, journal.START, 10**6):
            if entry.kind == "stored":
                found.setdefault(entry.fields["sop_instance_uid"], []).append(ObjectRef(**entry.fields["object"]))
    return found, FileStore(disk.mount / "data" / "objects")


def lost(disk: Disk, acknowledged: dict[str, bytes]) -> list[str]:
    """Give the acknowledged instances that are not there byte for byte."""
    found, store = recovered(disk)
    missing = []
    for uid, data in acknowledged.items():
        try:
            if uid not in found or store.read(found[uid][0]) != data:
                missing.append(uid)
        except Exception:  # noqa: BLE001  whatever keeps it from being read, it is lost
            missing.append(uid)
    return missing


def test_power_cuts_lose_nothing_acknowledged(disk: Disk, tmp_path: Path) -> None:
    """20 cuts of one data folder; at the end the index is rebuilt from the journal with every instance in it."""
    acknowledged: dict[str, bytes] = {}
    for number in range(CUTS):
        acknowledged |= cut_while_sending(disk, tmp_path, number)
        assert lost(disk, acknowledged) == [], f"after cut {number + 1}"
    assert len(acknowledged) > 20 * CUTS
    database = Database(f"sqlite:///{tmp_path / 'rebuilt.db'}")
    clock = SystemClock()
    EmbeddedBus(database, clock)
    grouping = Grouping(
        journal_folder=disk.mount / "data" / "journal",
        database=database,
        store=FileStore(disk.mount / "data" / "objects"),
        clock=clock,
        registry=load_registry(GatewayConfig.model_validate({"ae_titles": _TITLES})),
    )
    while grouping.step():
        pass
    with database.reading() as connection:
        rows = connection.execute(tables.instances.select()).all()
    assert {row.sop_instance_uid for row in rows} >= set(acknowledged)
    database.close()


def test_without_syncs_the_same_cut_loses(disk: Disk, tmp_path: Path) -> None:
    """The proof bites: the same, with the product's syncs replaced by nothing."""
    acknowledged = cut_while_sending(disk, tmp_path, 0, left_out=True)
    assert len(acknowledged) > 20
    assert lost(disk, acknowledged) != []
