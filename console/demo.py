"""`clarion demo`: the whole system on this machine, one chest CT through it, its results back in a PACS.

Everything is real and private: processes, ports and a folder of its own, a small PACS, C-STORE in and out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pydicom import dcmread
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from clarion.adapters.database import Database, private_schema
from clarion.adapters.objects import FileStore
from clarion.errors import PeerUnavailableError, PermanentError
from clarion.model import Destination
from clarion.testing.pacs import read_contents
from clarion.testing.phantom import PhantomSpec, make_phantom, write_phantom
from clarion.testing.ports import free_port
from console.checks import check_config
from console.exits import DONE, FAILED, INTERRUPTED
from console.sending import Sent, look_through, send_folder
from console.studies import StudyView, read_study
from console.supervisor import Supervisor
from console.topics import kafka_of
from streams.queries import ATTENTION

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clarion.testing.phantom import Phantom
    from console.checks import Checked

PACS_AE, OWN_AE, CALLED_AE, MODALITY_AE = "DEMOPACS", "CLARION", "CHEST", "DEMOCT"
WANTED = ("SEG", "RTSTRUCT", "SR")
_ENDED_JOBS = frozenset(("succeeded", "failed", "superseded"))
_ENDED_DELIVERIES = frozenset(("verified", "unverified", "failed", "superseded"))
_NAMED = 5
_GIVE_UP_S = 600.0
_LOOK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the person asked for."""

    folder: Path | None
    once: bool
    as_json: bool
    keep: Path | None
    kafka: str | None = None
    database: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ports:
    scp: int
    console: int
    pacs: int


def _config(ports: _Ports, root: Path, kafka: str | None, database: str | None) -> Path:
    described: dict[str, Any] = {
        "data": "data",
        "gateway": {
            "scp": {"port": ports.scp},
            "scu": {"ae_title": OWN_AE},
            "ae_titles": [{"ae_title": CALLED_AE, "rule": "by-tag", "settings": {"pipeline-chest": "chest-ct"}}],
            "sources": [{"ae_title": MODALITY_AE, "host": "127.0.0.1"}],
            "destinations": [{"name": "demo-pacs", "ae_title": PACS_AE, "host": "127.0.0.1", "port": ports.pacs}],
            "intake": {"watermark_percent": 100, "reserve_gb": 1},
            "delivery": {"retry_delay_s": 3},
        },
        "pipelines": [{"id": "chest-ct", "file": "builtin:chest-ct", "destinations": ["demo-pacs"]}],
        "console": {"port": ports.console},
    }
    if kafka is not None:
        # Topics of its own, so that one demo does not see another's events.
        topics = {"prefix": f"demo-{uuid.uuid4().hex[:8]}", "partitions": 3, "replication": 1, "min_insync_replicas": 1}
        described["bus"] = {"kind": "kafka", "kafka": {"bootstrap": kafka, **topics}}
    if database is not None:
        described["database"] = {"url": database}
    path = root / "clarion.yaml"
    path.write_text(yaml.safe_dump(described, sort_keys=False))
    return path


class Demo:
    """One run of the demo."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._screen = Console(stderr=True, quiet=options.as_json)
        self._phantom: Phantom | None = None
        self._begun = time.monotonic()
        self._shown = 0

    def run(self) -> tuple[int, dict[str, Any]]:
        """Run it; gives the exit status and the summary."""
        root = self._options.keep or Path(tempfile.mkdtemp(prefix="clarion-demo-"))
        root.mkdir(parents=True, exist_ok=True)
        given = self._options.database
        try:
            # Tables of its own, which are gone afterwards: nobody's are touched.
            with private_schema(given, f"demo_{uuid.uuid4().hex[:8]}") if given else nullcontext() as database:
                return self._run(root, database)
        finally:
            if self._options.keep is None:
                shutil.rmtree(root, ignore_errors=True)

    def _run(self, root: Path, database: str | None) -> tuple[int, dict[str, Any]]:
        ports = _Ports(scp=free_port(), console=free_port(), pacs=free_port())
        checked = check_config(_config(ports, root, self._options.kafka, database))
        if self._options.kafka is not None:
            self._make_topics(checked)
        with ExitStack() as stack:
            if self._options.folder is not None:
                # Before anything starts: a folder without DICOM is told at once.
                look_through(self._options.folder)
            folder = self._options.folder or self._generate(root)
            pacs = self._start_pacs(root, ports)
            stack.callback(_end, pacs)
            self._screen.print("[bold]Starting[/] intake, grouping, streams, orchestrator, delivery, console …")
            log_file = stack.enter_context((root / "clarion.log").open("ab"))
            supervisor = Supervisor(checked, log_file)
            stack.callback(supervisor.stop)
            supervisor.start()
            page = f"http://127.0.0.1:{ports.console}/"
            self._screen.print(
                f"  page [link={page}]{page}[/], SCP 127.0.0.1:{ports.scp} ({CALLED_AE}), log {root}/clarion.log"
            )
            gateway = Destination(name="gateway", ae_title=CALLED_AE, host="127.0.0.1", port=ports.scp)
            sent = self._send(folder, gateway)
            data = checked.config.data
            tables, store = Database(checked.config.database_url), FileStore(data / "objects")
            stack.callback(tables.close)
            views = self._wait(tables, store, supervisor, sorted(sent.studies))
            summary = self._summary(sent, views, root, page)
            self._show(summary)
            if not summary["verified"]:
                self._explain(views, root)
            if not self._options.once:
                self._stay(supervisor, page)
            return (DONE if summary["verified"] else FAILED), summary

    def _make_topics(self, checked: Checked) -> None:
        from clarion.adapters.kafka_topics import apply_topics  # noqa: PLC0415  an extra

        made = apply_topics(kafka_of(checked.config))
        self._screen.print(f"[bold]Kafka[/] {self._options.kafka}: {len(made)} topics made")

    def _generate(self, root: Path) -> Path:
        spec = PhantomSpec()
        folder = root / "phantom"
        folder.mkdir(exist_ok=True)
        with self._progress() as bar:
            row = bar.add_task("Generating a chest CT phantom", total=spec.slices)
            self._phantom = make_phantom(spec, lambda done: bar.update(row, completed=done))
        write_phantom(self._phantom, folder)
        return folder

    def _start_pacs(self, root: Path, ports: _Ports) -> subprocess.Popen[bytes]:
        caller = ["--caller", OWN_AE, "127.0.0.1", str(ports.scp)]
        command = [
            sys.executable,
            "-P",
            "-m",
            "clarion.testing.pacs",
            str(root / "pacs"),
            str(ports.pacs),
            PACS_AE,
            *caller,
        ]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(os.environ))  # noqa: S603  our own module

    def _send(self, folder: Path, gateway: Destination) -> Sent:
        with self._progress() as bar:
            row = bar.add_task(f"C-STORE to {gateway.ae_title}", total=None)
            sent = send_folder(
                folder,
                gateway,
                own_ae=MODALITY_AE,
                progress=lambda done, total: bar.update(row, completed=done, total=total),
            )
        self._screen.print(f"  {len(sent.acknowledged)} instances acknowledged, {len(sent.refused)} refused")
        if sent.skipped:
            named = ", ".join(sent.skipped[:_NAMED]) + (" …" if len(sent.skipped) > _NAMED else "")
            self._screen.print(f"  {len(sent.skipped)} files are no DICOM that could be sent: {escape(named)}")
        if not sent.acknowledged:
            raise PermanentError(f"nothing was accepted; first refusal: {sent.refused[:1]}")
        return sent

    def _wait(
        self, database: Database, store: FileStore, supervisor: Supervisor, studies: list[str]
    ) -> list[StudyView]:
        end = time.monotonic() + _GIVE_UP_S
        self._screen.print("[bold]What happens[/]")
        while time.monotonic() < end:
            supervisor.look()
            views = [view for uid in studies if (view := read_study(database, store, uid)) is not None]
            self._tell(views)
            if len(views) == len(studies) and all(map(_is_finished, views)):
                return views
            time.sleep(_LOOK_S)
        raise PeerUnavailableError(f"not finished after {_GIVE_UP_S:.0f} s; see the log")

    def _tell(self, views: list[StudyView]) -> None:
        lines = sorted((line for view in views for line in view.story), key=lambda line: line.time)
        for line in lines[self._shown :]:
            self._screen.print(
                f"  [cyan]{time.monotonic() - self._begun:5.1f} s[/] [bold]{line.state:<11}[/] {line.text}"
            )
        self._shown = max(self._shown, len(lines))

    def _summary(self, sent: Sent, views: list[StudyView], root: Path, page: str) -> dict[str, Any]:
        kept = {one.sop_instance_uid for one in read_contents(root / "pacs")}
        results = [
            {
                "modality": one.modality,
                "sop_instance_uid": one.sop_instance_uid,
                "size_bytes": one.object.size_bytes,
                "state": _state(view, job_id, one.sop_instance_uid, kept),
            }
            for view in views
            for job_id, instances in view.results.items()
            for one in instances
        ]
        verified = {one["modality"] for one in results if one["state"] == "Verified"}
        return {
            "acknowledged": len(sent.acknowledged),
            "refused": len(sent.refused),
            "skipped": sent.skipped,
            "studies": [{"study_uid": view.counts.study_uid, "state": view.state} for view in views],
            "results": results,
            "verified": verified.issuperset(WANTED),
            "dice": self._dice(
                root / "pacs", [str(one["sop_instance_uid"]) for one in results if one["modality"] == "SEG"]
            ),
            "seconds": round(time.monotonic() - self._begun, 1),
            "page": page,
        }

    def _dice(self, pacs: Path, seg_uids: list[str]) -> dict[str, float]:
        """Compare the lungs of the SEG that lies in the PACS with the phantom's truth."""
        if self._phantom is None or not seg_uids:
            return {}
        files = [
            path
            for path in pacs.glob("*.dcm")
            if str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) in seg_uids
        ]
        if not files:
            return {}
        found = _read_masks(files[0], self._phantom)
        truth = {"Left lung": self._phantom.left_lung, "Right lung": self._phantom.right_lung}
        return {name: round(dice(found[name], mask), 4) for name, mask in truth.items() if name in found}

    def _explain(self, views: list[StudyView], root: Path) -> None:
        """Say why nothing came back, and where to look."""
        said = [f"{job.cause}: {job.reason}" for view in views for job in view.jobs if job.reason]
        said += [one.reason for view in views for one in view.deliveries if one.state == "failed"]
        said += [one.reason for view in views for one in view.dead_letters]
        self._screen.print("[bold red]Not everything came back.[/] " + escape("; ".join(dict.fromkeys(said))))
        if self._options.keep is None:
            self._screen.print("  --keep FOLDER keeps log, data and PACS to look at")
        else:
            self._screen.print(f"  the log is {root}/clarion.log", soft_wrap=True)

    def _show(self, summary: dict[str, Any]) -> None:
        if not summary["results"]:
            return
        table = Table(title="Back in the PACS", title_justify="left")
        for column in ("object", "size", "state"):
            table.add_column(column, justify="right" if column == "size" else "left")
        for one in summary["results"]:
            table.add_row(one["modality"], f"{one['size_bytes'] / 1e6:.2f} MB", one["state"])
        self._screen.print(table)
        for name, value in summary["dice"].items():
            self._screen.print(f"  {name}: Dice {value:.4f} against the phantom's truth")
        self._screen.print(f"  finished after {summary['seconds']} s")

    def _stay(self, supervisor: Supervisor, page: str) -> None:
        self._screen.print(f"[bold green]The page stays up:[/] {page}  (Ctrl-C ends the demo)")
        supervisor.watch()

    def _progress(self) -> Progress:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        return Progress(*columns, console=self._screen, disable=self._options.as_json or not self._screen.is_terminal)


def _is_finished(view: StudyView) -> bool:
    """Tell whether nothing more happens to a study by itself: its jobs and deliveries are at their ends."""
    if view.dead_letters or not view.jobs:
        nothing_taken = view.counts.grouped == 0 and view.counts.received > 0 and view.state in ATTENTION
        return bool(view.dead_letters) or nothing_taken or view.state in {"Failed", "Ignored"}
    delivered = {one.job_id for one in view.deliveries}
    ended = [
        job.state in _ENDED_JOBS and (job.state != "succeeded" or job.job_id in delivered or not view.results)
        for job in view.jobs
    ]
    settled = all(ended) and all(one.state in _ENDED_DELIVERIES for one in view.deliveries)
    # Late instances begin a revision, which will have a job of its own.
    return settled and view.state != "Received"


def _state(view: StudyView, job_id: str, uid: str, kept: set[str]) -> str:
    """Say how one result stands: by the delivery of its job, and by what lies in the PACS."""
    if uid not in kept:
        return "Missing"
    states = {one.state for one in view.deliveries if one.job_id == job_id}
    return "Verified" if states == {"verified"} else view.state


def _read_masks(path: Path, phantom: Phantom) -> dict[str, NDArray[np.bool_]]:
    """Read a BINARY SEG by position, independently of the writer: booleans `[slice, row, column]` per segment label."""
    seg = dcmread(path)
    labels = {int(one.SegmentNumber): str(one.SegmentLabel) for one in seg.SegmentSequence}
    found = {label: np.zeros(phantom.hu.shape, dtype=bool) for label in labels.values()}
    spec = phantom.spec
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = bits[: seg.NumberOfFrames * seg.Rows * seg.Columns].reshape(-1, seg.Rows, seg.Columns)
    for frame, item in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        height = float(item.PlanePositionSequence[0].ImagePositionPatient[2])
        index = round((height + spec.length_mm / 2) / spec.step_mm - 0.5)
        number = int(item.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        found[labels[number]][index] = frame
    return found


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Twice the common voxels over the sum of both."""
    common, both = int(np.count_nonzero(one & other)), int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return 2 * common / max(1, both)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def run_demo(options: Options) -> tuple[int, dict[str, Any]]:
    """Run the demo; a SIGTERM ends it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return Demo(options).run()
    except KeyboardInterrupt:
        return INTERRUPTED, {"interrupted": True}
