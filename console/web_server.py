"""A web server in a thread of a process's own, stopped when that drains; under TLS its certificate is renewed."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog
import uvicorn

from clarion.errors import ResourceBusyError
from gateway.wire.secure import Renewed, acceptor_context, take_over

if TYPE_CHECKING:
    from fastapi import FastAPI

    from clarion.model import TlsFiles

log = structlog.get_logger()

_START_S = 15.0
_STOP_S = 10.0
_GRACE_S = 5


class WebServer:
    """Serves an application from when it is made until `stop`. Raises ResourceBusyError when it cannot listen."""

    def __init__(self, application: FastAPI, *, name: str, host: str, port: int, tls: TlsFiles | None = None) -> None:
        self._name = name
        config = uvicorn.Config(
            application, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S,
            server_header=False,
        )  # fmt: skip
        self._renewed = Renewed(tls, acceptor_context) if tls is not None else None
        if self._renewed is not None:
            config.load()
            config.ssl = self._shown = self._seen = self._renewed.context()
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="web", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise ResourceBusyError(f"{name}: cannot listen on {host}:{port}; is the port taken?")
            time.sleep(0.02)

    def look(self) -> None:
        """See that it still serves, and show a certificate that was renewed. Raises ResourceBusyError."""
        if not self._thread.is_alive():
            raise ResourceBusyError(f"{self._name}: the web server has ended")
        if self._renewed is None:
            return
        context = self._renewed.context()
        if context is not self._seen:
            # The new files are good; what the server listens with stays, and takes them over.
            self._seen = context
            take_over(self._shown, self._renewed.files)

    def stop(self) -> None:
        """Let open requests end, for a while."""
        self._server.should_exit = True
        self._thread.join(_STOP_S)

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:
            # uvicorn leaves so when it cannot listen; the thread's end says it.
            return
