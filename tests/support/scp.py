"""The real SCP with intake, store and journal in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.world import free_port

from clarion.adapters.files import FileStore, free_bytes
from clarion.adapters.memory import ManualClock
from clarion.config import GatewayConfig
from clarion.model import Destination
from clarion.testing.suites import MOMENT
from gateway import journal
from gateway.access import AccessList
from gateway.intake import Intake
from gateway.journal import JournalWriter
from gateway.scp import Scp
from gateway.scu import Requestor, Timeouts
from gateway.space import Space

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


@dataclass
class Serving:
    scp: Scp
    port: int
    root: Path

    def requestor(self, *, calling: str = "A", called: str = "B", sop_class: str = CT) -> Requestor:
        peer = Destination(name="us", ae_title=called, host="127.0.0.1", port=self.port)
        timeouts = Timeouts(connect_s=5, dimse_s=5)
        return Requestor(peer, own_ae=calling, classes=[(sop_class, EXPLICIT)], timeouts=timeouts)

    def journalled(self) -> list[tuple[str, dict[str, Any]]]:
        entries = journal.read(self.root / "journal", journal.START, 10_000)
        return [(one.kind, one.fields) for one in entries]


@contextmanager
def serving(
    root: Path, *, measure: Callable[[Path], tuple[int, int]] = free_bytes, **gateway: Any
) -> Iterator[Serving]:
    """Serve as AE title B for the source A on loopback; `gateway` overrides parts of the configuration."""
    port = free_port()
    described = {
        "scp": {"port": port},
        "ae_titles": [{"ae_title": "B"}],
        "sources": [{"ae_title": "A", "host": "127.0.0.1"}],
        "intake": {"watermark_percent": 100, "reserve_gb": 0},
        **gateway,
    }
    described["scp"] = {"port": port, **gateway.get("scp", {})}
    config = GatewayConfig.model_validate(described)
    space = Space(root, config.intake, measure)
    writer = JournalWriter(root / "journal", ManualClock(MOMENT))
    intake = Intake(
        store=FileStore(root / "objects"),
        journal=writer,
        space=space,
        ignored_classes={one.ae_title: frozenset(one.ignored_sop_classes) for one in config.ae_titles},
        wake=lambda: None,
    )
    scp = Scp(config.scp, access=AccessList(config), intake=intake, space=space)
    try:
        yield Serving(scp, port, root)
    finally:
        scp.drain(1)
        writer.close()
