"""The console's process: the web page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from console.pages.routes import Pages
from console.schema import create_tables
from console.web_server import WebServer

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from clarion.adapters.objects import FileStore
    from console.checks import Checked


class ConsoleStage:
    """Serves the page."""

    def __init__(self, checked: Checked, database: Database, store: FileStore) -> None:
        console = checked.config.console
        create_tables(database)
        self._port = console.port
        pages = Pages(checked.config, database, store).application()
        self._server = WebServer(pages, name="console", host=console.host, port=console.port)

    def step(self) -> bool:
        """Nothing to do here: requests have threads of their own."""
        self._server.look()
        return False

    def facts(self) -> dict[str, object]:
        """Say the port."""
        return {"port": self._port}

    def drain(self) -> None:
        """Let open requests end."""
        self._server.stop()
