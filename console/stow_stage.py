"""The process that receives by STOW-RS: a web server before an intake with a log of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.adapters.objects import FileStore
from clarion.processes import raise_file_limit
from console.stages import STOW
from console.stow import Stow
from console.web_server import WebServer
from gateway.association_log import AssociationLog
from gateway.board import PEER_NUMBERS
from gateway.doorbell import Doorbell
from gateway.intake import Intake
from gateway.journal_writer import JournalWriter
from gateway.space import Space

if TYPE_CHECKING:
    from pathlib import Path

    from clarion.config import GatewayConfig
    from clarion.ports import Clock


class StowStage:
    """Receiving by STOW-RS."""

    def __init__(self, config: GatewayConfig, data: Path, clock: Clock) -> None:
        if config.stow is None:
            raise ValueError("gateway.stow is not configured")
        raise_file_limit()
        journal = data / "journal"
        self._space = Space(data, config.intake)
        doorbell = Doorbell(journal, data / "wake")
        self._journal = JournalWriter(journal / STOW, clock, on_commit=doorbell.ring)
        intake = Intake(
            store=FileStore(data / "objects"),
            journal=self._journal,
            space=self._space,
            ignored_classes={one.ae_title: frozenset(one.ignored_sop_classes) for one in config.ae_titles},
        )
        self._stow = Stow(config, intake, AssociationLog(data))
        self._port = config.stow.port
        self._server = WebServer(
            self._stow.application(),
            name="gateway.stow",
            host=config.stow.host,
            port=config.stow.port,
            tls=config.stow.tls.files if config.stow.tls is not None else None,
        )

    def step(self) -> bool:
        """Nothing to do here: requests are served by the web server."""
        self._server.look()
        return False

    def facts(self) -> dict[str, object]:
        """Say the port, the requests, what was received, and whether there is room."""
        return {
            "port": self._port,
            "requests": self._stow.open_requests,
            "stored": self._stow.stored,
            "refused": self._stow.refused,
            "refusals": self._stow.rejected,
            "peers": {
                title: dict(zip(PEER_NUMBERS, counts, strict=True)) for title, counts in self._stow.peers.items()
            },
            "space": "ok" if self._space.available() else "low",
        }

    def drain(self) -> None:
        """Let open requests end, close the journal."""
        self._server.stop()
        self._journal.close()
