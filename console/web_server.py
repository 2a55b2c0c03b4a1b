"""A web server in a thread of a process's own, stopped when that drains; under TLS its certificate is renewed."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from clarion.errors import ResourceBusyError
from gateway.wire.secure import Renewed, acceptor_context

if TYPE_CHECKING:
    import asyncio
    import ssl

    from fastapi import FastAPI

    from clarion.model import TlsFiles

log = structlog.get_logger()

_START_S = 15.0
_STOP_S = 10.0
_GRACE_S = 5
FIRST_REQUEST_S = 30.0
"""A connection must have asked for something by then."""


class _Patient(H11Protocol):
    """A connection that has to ask for something soon: uvicorn waits for ever for its first request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as it is called
        """Give the peer so long."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(FIRST_REQUEST_S, transport.close)

    def data_received(self, data: bytes) -> None:
        """Once the head of a request is there, others have deadlines for the rest."""
        super().data_received(data)
        if self.cycle is not None:  # None until then
            self._deadline.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._deadline.cancel()
        super().connection_lost(exc)


class WebServer:
    """Serves an application from when it is made until `stop`. Raises ResourceBusyError when it cannot listen."""

    def __init__(self, application: FastAPI, *, name: str, host: str, port: int, tls: TlsFiles | None = None) -> None:
        self._name = name
        config = uvicorn.Config(
            application, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=_GRACE_S,
            server_header=False,
            http=_Patient,
        )  # fmt: skip
        if tls is not None:
            config.load()
            config.ssl = acceptor_context(tls)
            config.ssl.sni_callback = partial(_take_present, Renewed(tls, acceptor_context))
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="web", daemon=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise ResourceBusyError(f"{name}: cannot listen on {host}:{port}; is the port taken?")
            time.sleep(0.02)

    def look(self) -> None:
        """See that it still serves. Raises ResourceBusyError."""
        if not self._thread.is_alive():
            raise ResourceBusyError(f"{self._name}: the web server has ended")

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


def _take_present(renewed: Renewed, connection: ssl.SSLObject, _name: str | None, _listening: ssl.SSLContext) -> None:
    """Let a connection that begins show, and believe, what the files have now."""
    connection.context = renewed.context()
