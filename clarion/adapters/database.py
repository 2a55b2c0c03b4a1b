"""The database: short write transactions that begin by taking the write lock, and readers that never block them.

Embedded default: one SQLite file, WAL, `synchronous=FULL`, foreign keys on. Vendor errors become
BusUnavailableError here, so that callers know only "later".
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from clarion.errors import BusUnavailableError, ConfigError, DatabaseRefusalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BUSY_TIMEOUT_S = 20.0
_READ_ONLY = {"clarion_read_only": True}

_schema = sa.MetaData()
_versions = sa.Table(
    "schema_versions",
    _schema,
    sa.Column("stage", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
)


class Database:
    """One database; safe from several threads and processes, not across a fork."""

    def __init__(self, url: str, *, on_commit: Callable[[], None] | None = None) -> None:
        self._engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False})
        self._on_commit = on_commit
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)

    def create(self, stage: str, tables: sa.MetaData, version: int) -> None:
        """Make a stage's tables if they are not there. Raises ConfigError when a newer Clarion made them."""
        with self.transaction() as connection:
            _schema.create_all(connection)
            found = connection.execute(sa.select(_versions.c.version).where(_versions.c.stage == stage)).scalar()
            if found is not None and found > version:
                raise ConfigError(
                    [f"database.url: {stage!r} has table version {found}, known here is {version}; run a newer one"]
                )
            tables.create_all(connection)
            if found is None:
                connection.execute(_versions.insert().values(stage=stage, version=version))

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Write: committed and durable when the block ends, gone when it raises. Keep it short."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            raise _ours(error, "written") from error
        if self._on_commit is not None:
            self._on_commit()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Read one consistent state."""
        try:
            with self._engine.connect().execution_options(**_READ_ONLY) as connection:
                yield connection
        except DBAPIError as error:
            raise _ours(error, "read") from error

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def _ours(error: DBAPIError, done: str) -> BusUnavailableError | DatabaseRefusalError:
    """Busy, full or broken may pass; a statement that is wrong stays wrong."""
    kind = type(error.orig).__name__
    if isinstance(error, OperationalError):
        return BusUnavailableError(f"the database cannot be {done} now: {kind}")
    return DatabaseRefusalError(f"the database refuses: {kind}")


def _configure(connection: Any, _record: object) -> None:  # noqa: ANN401  a DBAPI connection, whatever the driver
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("clarion_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
