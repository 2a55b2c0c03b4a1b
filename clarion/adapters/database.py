"""The database: SQLite (embedded default) or PostgreSQL; short write transactions, readers that never block them.

Contract. A transaction is durable when its block ends and gone when the block raises; whoever saw an error that may
pass does it again, for it may have been committed all the same. Nothing may rely on there being one writer at a time,
as SQLite has it: what must not happen side by side takes a `lock` by name. Vendor errors become BusUnavailableError
here, so that callers know only "later".
"""

from __future__ import annotations

import functools
import json
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from pydantic_core import PydanticSerializationError, to_json
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError

from clarion.adapters import schema
from clarion.errors import BusUnavailableError, DatabaseRefusalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from clarion.adapters.schema import Schema

# A statement or a lock that takes longer is given up and tried again.
_BUSY_TIMEOUT_S = 20.0
_CONNECT_S = 10
_IDLE_S = 120
_POSTGRESQL_OPTIONS = (
    f"-c statement_timeout={_BUSY_TIMEOUT_S:.0f}s -c lock_timeout={_BUSY_TIMEOUT_S:.0f}s "
    f"-c idle_in_transaction_session_timeout={_IDLE_S}s -c synchronous_commit=on"
)
_READ_ONLY = {"clarion_read_only": True}

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
"""Text that sorts by code point on either database, as stored times and UIDs must."""
BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""An integer of 64 bits, also as a key that counts by itself."""


class Database:
    """One database; safe from several threads and processes, not across a fork."""

    def __init__(self, url: str, *, on_commit: Callable[[], None] | None = None) -> None:
        self.is_sqlite = url.startswith("sqlite")
        self._engine = _sqlite_engine(url) if self.is_sqlite else _postgresql_engine(url)
        self._on_commit = on_commit

    def create(self, wanted: Schema) -> None:
        """Bring a stage's tables to the version this code knows. Raises ConfigError when a newer Clarion made them."""
        with self.reading() as connection:
            if schema.is_current(connection, wanted):
                return
        with self.transaction() as connection:
            if not self.is_sqlite:
                # As long as it takes: a large table is changed, or another process is doing so.
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
                connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
            lock(connection, "schema", wanted.stage)
            schema.migrate(connection, wanted)

    @contextmanager
    def transaction(self, *, quiet: bool = False) -> Iterator[sa.Connection]:
        """Write: committed and durable when the block ends, gone when it raises. Keep it short.

        A `quiet` one wakes nobody: what it writes is nothing that others wait for.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            raise _ours(error, "written") from error
        if self._on_commit is not None and not quiet:
            self._on_commit()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Read one consistent state."""
        try:
            with self._engine.connect() as connection:
                yield connection.execution_options(**self._read_only())
        except DBAPIError as error:
            raise _ours(error, "read") from error

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _read_only(self) -> dict[str, Any]:
        if self.is_sqlite:
            return _READ_ONLY
        return {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


def lock(connection: sa.Connection, *names: object) -> None:
    """Let nobody else pass a lock of this name until the transaction ends. SQLite's transactions exclude each other."""
    if connection.dialect.name == "postgresql":
        name = "/".join(map(str, ("clarion", *names)))
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))


def insert_new(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert rows, passing over those that are there already; gives how many were not."""
    if not rows:
        return 0
    statement = _insert(connection.dialect, table).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
    return int(connection.execute(statement, [dict(row) for row in rows]).rowcount)


def insert_many(
    connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]], *, new_only: bool = False
) -> int:
    """Insert rows that all have the same columns, each that is not generated; gives how many were inserted.

    `new_only` passes over those that are there already. SQLAlchemy's own way costs more for each row than SQLite.
    """
    if not rows:
        return 0
    insertion = _insertion(connection.dialect, table, tuple(rows[0]), new_only)
    values = [insertion.values(row) for row in rows]
    options = {"preserve_rowcount": True}
    return int(connection.exec_driver_sql(insertion.text, values, execution_options=options).rowcount)


class _Insertion:
    """An INSERT as the driver takes it, and how to make its parameters of a row."""

    def __init__(self, dialect: sa.Dialect, table: sa.Table, names: Sequence[str], *, new_only: bool) -> None:
        made = _insert(dialect, table)
        compiled = (made.on_conflict_do_nothing() if new_only else made).compile(dialect=dialect, column_keys=names)
        if compiled.insert_prefetch:
            raise TypeError(f"{table.name} has defaults: name each column")
        self.text = str(compiled)
        self._in_order = itemgetter(*compiled.positiontup) if compiled.positional else None
        processors = {name: table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names}
        self._processors = [(name, process) for name, process in processors.items() if process is not None]

    def values(self, row: Mapping[str, Any]) -> Any:  # noqa: ANN401  a tuple or a mapping, as the driver counts or names
        bound = dict(row)
        for name, process in self._processors:
            bound[name] = process(bound[name])
        return bound if self._in_order is None else self._in_order(bound)


@functools.lru_cache(64)
def _insertion(dialect: sa.Dialect, table: sa.Table, names: tuple[str, ...], new_only: bool) -> _Insertion:  # noqa: FBT001  a key of the cache
    return _Insertion(dialect, table, names, new_only=new_only)


def replace(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Insert a row, or give the one with its primary key these values."""
    keys = [column.name for column in table.primary_key]
    rest = {name: value for name, value in row.items() if name not in keys}
    statement = _insert(connection.dialect, table).values(**row).on_conflict_do_update(index_elements=keys, set_=rest)
    connection.execute(statement)


def _insert(dialect: sa.Dialect, table: sa.Table) -> Any:  # noqa: ANN401  the two dialects' inserts share no type
    return (postgresql if dialect.name == "postgresql" else sqlite).insert(table)


def may_pass(error: DBAPIError) -> bool:
    """Tell whether the database is busy, full, broken or away, and not the statement wrong."""
    return isinstance(error, OperationalError) or error.connection_invalidated


def _ours(error: DBAPIError, done: str) -> BusUnavailableError | DatabaseRefusalError:
    """Busy, full or broken may pass; a statement that is wrong stays wrong."""
    kind = type(error.orig).__name__
    if may_pass(error):
        return BusUnavailableError(f"the database cannot be {done} now: {kind}")
    return DatabaseRefusalError(f"the database refuses: {kind}")


def _sqlite_engine(url: str) -> sa.Engine:
    engine = sa.create_engine(
        url, json_serializer=as_json, connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False}
    )
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _postgresql_engine(url: str) -> sa.Engine:
    given = sa.make_url(url)
    options = f"{given.query.get('options', '')} {_POSTGRESQL_OPTIONS}"
    return sa.create_engine(
        given.set(drivername="postgresql+psycopg"),
        json_serializer=as_json,
        max_overflow=20,
        connect_args={"connect_timeout": _CONNECT_S, "options": options, "application_name": "clarion"},
    )


@contextmanager
def private_schema(url: str, name: str) -> Iterator[str]:
    """Make a schema of our own in a PostgreSQL database, for as long as the block lasts; gives the URL that uses it."""
    given = sa.make_url(url)
    engine = sa.create_engine(given.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(sa.schema.CreateSchema(name))
        try:
            yield given.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
        finally:
            with engine.connect() as connection:
                connection.execute(sa.schema.DropSchema(name, cascade=True))
    except DBAPIError as error:
        raise _ours(error, "written") from error
    finally:
        engine.dispose()


def as_json(value: object) -> str:
    """Write JSON as `json.dumps` does, in ASCII, and several times as fast."""
    try:
        return to_json(value, ensure_ascii=True).decode()
    except PydanticSerializationError:  # half of a surrogate pair, which only an escape can say
        return json.dumps(value)


def _configure(connection: Any, _record: object) -> None:  # noqa: ANN401  a DBAPI connection, whatever the driver
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("clarion_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
