"""The real SCP with intake, store and journal in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.threads import ReceiverThreads
from support.world import free_port

from clarion.adapters.clock import SystemClock
from clarion.adapters.files import free_bytes
from clarion.adapters.objects import FileStore
from clarion.config import GatewayConfig
from clarion.model import Destination, ObjectRef
from console.intake import IntakeStage
from gateway import journal
from gateway.board import Board
from gateway.guard import Guard
from gateway.scu import Requestor, Timeouts

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


@dataclass
class Serving:
    stage: IntakeStage
    port: int
    root: Path

    @property
    def board(self) -> Board:
        return self.stage.board

    @property
    def guard(self) -> Guard:
        return self.stage.receiver.guard  # type: ignore[attr-defined]  # ReceiverThreads

    def requestor(self, *, calling: str = "A", called: str = "B", sop_class: str = CT) -> Requestor:
        peer = Destination(name="us", ae_title=called, host="127.0.0.1", port=self.port)
        timeouts = Timeouts(connect_s=30, dimse_s=30)
        return Requestor(peer, own_ae=calling, classes=[(sop_class, EXPLICIT)], timeouts=timeouts)

    def journalled(self) -> list[tuple[str, dict[str, Any]]]:
        folder = self.root / "journal"
        found = [one for log in journal.logs(folder) for one in journal.read(folder / log, journal.START, 10_000)]
        return [(one.kind, one.fields) for one in sorted(found, key=lambda one: one.time)]

    def read(self, fields: dict[str, Any]) -> bytes:
        return FileStore(self.root / "objects").read(ObjectRef(**fields["object"]))


@contextmanager
def serving(
    root: Path, *, workers: int = 1, measure: Callable[[Path], tuple[int, int]] = free_bytes, **gateway: Any
) -> Iterator[Serving]:
    """Serve as AE title B for the source A on loopback; `gateway` overrides parts of the configuration."""
    port = free_port()
    described = {
        "ae_titles": [{"ae_title": "B"}],
        "sources": [{"ae_title": "A", "host": "127.0.0.1"}],
        "intake": {"watermark_percent": 100, "reserve_gb": 0},
        **gateway,
    }
    described["scp"] = {"port": port, "workers": workers, **gateway.get("scp", {})}
    config = GatewayConfig.model_validate(described)
    stage = IntakeStage(config, root, SystemClock(), ReceiverThreads, measure)
    try:
        yield Serving(stage, port, root)
    finally:
        stage.drain()
