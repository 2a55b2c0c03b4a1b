"""The console's process: the web server in a thread, stopped when the process drains."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from clarion.errors import ResourceBusyError
from console.pages.routes import Pages
from console.schema import create_tables

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from clarion.adapters.objects import FileStore
    from console.checks import Checked

_START_S = 15.0
_STOP_S = 10.0


class ConsoleStage:
    """Serves the page."""

    def __init__(self, checked: Checked, database: Database, store: FileStore) -> None:
        config = checked.config
        create_tables(database)
        self._port = config.console.port
        self._server = uvicorn.Server(
            uvicorn.Config(
                Pages(config, database, store).application(),
                host=config.console.host,
                port=config.console.port,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=5,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="web", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise ResourceBusyError(
                    f"console: cannot listen on {config.console.host}:{config.console.port}; is the port taken?"
                )
            time.sleep(0.02)

    def step(self) -> bool:
        """Nothing to do here: requests have threads of their own."""
        if not self._thread.is_alive():
            raise ResourceBusyError("console: the web server has ended")
        return False

    def facts(self) -> dict[str, object]:
        """Say the port."""
        return {"port": self._port}

    def drain(self) -> None:
        """Let open requests end."""
        self._server.should_exit = True
        self._thread.join(_STOP_S)

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:
            # uvicorn leaves so when it cannot listen; the thread's end says it.
            return
