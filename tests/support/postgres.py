"""A real PostgreSQL: that of CLARION_TEST_DATABASE, one of our own in a private folder on loopback, or a container."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from support import containers
from support.dcmtk import need
from support.world import free_port, pause

from clarion.adapters.database import Database

# Which database `url_in` gives; the fixture `each_database` changes it.
SQLITE, POSTGRESQL = "sqlite", "postgresql"
IMAGE = "postgres:15"
current = SQLITE


def source() -> str:
    """Say which server serves, in words."""
    if os.environ.get("CLARION_TEST_DATABASE"):
        return "that of CLARION_TEST_DATABASE"
    if found := _installed():
        return f"PostgreSQL {found[-1].parts[4]}, of our own"
    return f"container {IMAGE}" if containers.engine() else "none: install postgresql"


def _installed() -> list[Path]:
    return sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))


def programs() -> Path:
    """Give the folder of the newest server that is installed."""
    found = _installed()
    need(found[-1] if found else Path("/usr/lib/postgresql/15/bin/postgres"), "postgresql")
    return found[-1].parent


@dataclass
class Server:
    """A server; `kill` ends it as the power does, `start` brings it back on the same port and folder."""

    url: str
    folder: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    container: Any = None

    def start(self) -> None:
        if self.folder is None:
            return
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(programs() / "postgres"), "-D", str(self.folder / "data")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, user=account(),
            )  # fmt: skip
        self.wait()

    def wait(self, deadline_s: float = 60) -> None:
        end = time.monotonic() + deadline_s
        while True:
            try:
                psycopg.connect(f"{self.url}/postgres", connect_timeout=5).close()
            except psycopg.OperationalError:
                assert time.monotonic() < end, self.log()
                assert self.process is None or self.process.poll() is None, self.log()
                pause(0.05)
            else:
                return

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        if self.container is not None:
            self.container.stop()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-3000:] if self.folder else ""

    def database(self, name: str) -> str:
        """Make a database if it is not there, with every stage's tables; gives its URL."""
        with psycopg.connect(f"{self.url}/postgres", autocommit=True) as connection:
            there = {row[0] for row in connection.execute("SELECT datname FROM pg_database")}
            if name not in there:
                connection.execute(f"CREATE DATABASE {name} TEMPLATE {self._template(connection, there)}")
        return f"{self.url}/{name}"

    def _template(self, connection: psycopg.Connection, there: set[str]) -> str:
        from console.schema import create_tables

        name = f"clarion_template_{os.getpid()}"
        if name not in there:
            connection.execute(f"CREATE DATABASE {name}")
            database = Database(f"{self.url}/{name}")
            create_tables(database)
            database.close()
        return name


def account() -> str | None:
    """The server refuses to be run by root."""
    if os.getuid():
        return None
    names = {one.pw_name for one in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def start_server() -> Server:
    """Use the server that the environment names, or start one of our own; the caller stops it."""
    given = os.environ.get("CLARION_TEST_DATABASE")
    if given:
        return Server(given.rsplit("/", 1)[0])
    if source().startswith("container"):
        container, url = containers.run_postgres(IMAGE)
        return Server(url, container=container)
    folder = Path(tempfile.mkdtemp(prefix="clarion-postgresql-"))
    if (user := account()) is not None:
        shutil.chown(folder, user)
    make = [str(programs() / "initdb"), "-A", "trust", "-N", "-U", "clarion", "-E", "UTF8", "-D", str(folder / "data")]
    subprocess.run(make, user=user, check=True, stdout=subprocess.DEVNULL, timeout=120, cwd=folder)
    port = free_port()
    with (folder / "data" / "postgresql.conf").open("a") as file:
        file.write(
            f"port={port}\nlisten_addresses='127.0.0.1'\nunix_socket_directories=''\nmax_connections=200\n"
            "shared_buffers=32MB\nlog_min_messages=fatal\nlog_min_error_statement=fatal\n"
        )
    server = Server(f"postgresql://clarion@127.0.0.1:{port}", folder)
    server.start()
    return server


@functools.cache
def shared() -> Server:
    """One server for the whole run."""
    server, owner = start_server(), os.getpid()

    def stop() -> None:
        # Children that a test forked are not its owner.
        if os.getpid() == owner:
            server.stop()

    atexit.register(stop)
    return server


def url_in(folder: Path) -> str:
    """Give the URL of the database that belongs to a folder, of the kind under test."""
    if current == SQLITE:
        return f"sqlite:///{folder / 'clarion.db'}"
    return shared().database(f"c{hashlib.sha256(str(folder).encode()).hexdigest()[:20]}")
