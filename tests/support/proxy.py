"""A TCP proxy before a Kafka broker that loses answers: what was asked is done, and nobody is told."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

PRODUCE = 0


class Proxy:
    """Forwards to `target`; of every two answers to a produce request it swallows the first and cuts the connection."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.losing = False
        self.swallowed = 0
        self._answers = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                _Pair(self, client, server).start()

    def keeps(self) -> bool:
        """Tell whether an answer to a produce request may pass."""
        if not self.losing:
            return True
        self._answers += 1
        if self._answers % 2 == 0:
            return True
        self.swallowed += 1
        return False


class _Pair:
    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        # Which requests were forwarded, in order: answers come in the same order.
        self._asked: list[int] = []

    def start(self) -> None:
        for forward in (self._requests, self._answers):
            threading.Thread(target=self._guarded, args=(forward,), daemon=True).start()

    def _guarded(self, forward: object) -> None:
        with contextlib.suppress(OSError, EOFError):
            forward()  # type: ignore[operator]
        for one in (self._client, self._server):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _requests(self) -> None:
        while True:
            frame = _frame(self._client)
            self._asked.append(struct.unpack(">h", frame[4:6])[0])
            self._server.sendall(frame)

    def _answers(self) -> None:
        while True:
            frame = _frame(self._server)
            if self._asked.pop(0) == PRODUCE and not self._proxy.keeps():
                return
            self._client.sendall(frame)


def _frame(end: socket.socket) -> bytes:
    size = _exactly(end, 4)
    return size + _exactly(end, struct.unpack(">i", size)[0])


def _exactly(end: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = end.recv(count - len(found))
        if not more:
            raise EOFError
        found += more
    return found
