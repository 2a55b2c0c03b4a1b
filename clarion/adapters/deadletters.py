"""Dead letters: what a consumer gave up, with the reason and the place where it still lies. The body is not copied."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
import structlog

from clarion.adapters.database import insert_new
from clarion.adapters.outbox import dead_letters, publish
from clarion.codec import decode
from clarion.crashpoints import effect
from clarion.errors import BusUnavailableError, describe
from clarion.model import derive
from clarion.patience import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime

    from clarion.adapters.database import Database
    from clarion.codec import Record
    from clarion.plugins import StreamHandler

log = structlog.get_logger()

_BATCH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record lies: in the table `events`, or in a topic's partition at an offset."""

    origin: str
    partition: int
    position: int


class State(enum.StrEnum):
    """What became of a dead letter."""

    OPEN = "open"
    """Nobody has looked at it yet, or a redrive failed."""
    REDRIVE = "redrive"
    """A person asked that its consumer see it again."""
    REDRIVEN = "redriven"
    """Its consumer has handled it."""
    DISCARDED = "discarded"
    """A person said that it does not matter."""
    QUARANTINED = "quarantined"
    """It failed so often that only a person may ask again, one by one."""


PENDING = (State.OPEN, State.REDRIVE, State.QUARANTINED)
"""States in which a letter still asks for attention."""
MOST_REDRIVES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event that a consumer gave up, and why; where it lies, the digest of its body, what became of it."""

    letter_id: str
    state: str
    redrives: int
    consumer: str
    origin: str
    partition: int
    position: int
    event_id: str
    digest: str
    kind: str
    subject: str
    error: str
    reason: str
    tries: int
    time: str


def bury(
    database: Database, consumer: str, place: Place, record: Record, *, error: Exception, tries: int, now: datetime
) -> None:
    """Note a record that a consumer gives up; noted again, it is the same letter."""
    kind = record.headers.get("ce_type", "")
    log.error("handler.deadletter", consumer=consumer, kind=kind, error=type(error).__name__)
    letter = {
        "consumer": consumer,
        "origin": place.origin,
        "partition": place.partition,
        "position": place.position,
        "event_id": record.headers.get("ce_id", ""),
        "kind": kind,
        "subject": record.key,
        "digest": hashlib.sha256(record.body).hexdigest(),
        "error": type(error).__name__,
        "reason": reason_of(error),
        "tries": tries,
        "time": now.isoformat(),
        "letter_id": derive("deadletter", consumer, place.origin, place.partition, place.position),
        "state": State.OPEN,
        "redrives": 0,
    }
    with effect("bus.deadletter"), database.transaction() as connection:
        insert_new(connection, dead_letters, [letter])


def count_dead_letters(database: Database) -> int:
    """Count the dead letters that still ask for attention."""
    query = sa.select(sa.func.count()).where(dead_letters.c.state.in_(PENDING))
    with database.reading() as connection:
        return int(connection.execute(query).scalar_one())


def count_by_reason(database: Database) -> list[tuple[str, str, str, int]]:
    """Count the letters that ask for attention by consumer, state and reason, the most frequent first."""
    table, count = dead_letters, sa.func.count()
    query = (
        sa.select(table.c.consumer, table.c.state, table.c.reason, count)
        .where(table.c.state.in_(PENDING))
        .group_by(table.c.consumer, table.c.state, table.c.reason)
        .order_by(count.desc(), table.c.consumer, table.c.reason)
    )
    with database.reading() as connection:
        return [(row[0], row[1], row[2], row[3]) for row in connection.execute(query)]


def read_dead_letters(
    database: Database,
    limit: int = 500,
    *,
    states: Iterable[str] = PENDING,
    consumers: Iterable[str] | None = None,
    letter_ids: Iterable[str] | None = None,
) -> list[DeadLetter]:
    """List dead letters in some states, the newest first; of some consumers and ids, or of all."""
    query = sa.select(dead_letters).where(dead_letters.c.state.in_(list(states)))
    if consumers is not None:
        query = query.where(dead_letters.c.consumer.in_(list(consumers)))
    if letter_ids is not None:
        query = query.where(dead_letters.c.letter_id.in_(list(letter_ids)))
    query = query.order_by(dead_letters.c.time.desc(), dead_letters.c.letter_id).limit(limit)
    with database.reading() as connection:
        return [DeadLetter(**row) for row in connection.execute(query).mappings()]


def mark(database: Database, letter_ids: Iterable[str], state: State) -> list[str]:
    """Put letters that still ask for attention into a state; gives those it changed. One path for one and for many."""
    here = sa.and_(dead_letters.c.letter_id.in_(sorted(letter_ids)), dead_letters.c.state.in_(PENDING))
    with effect("deadletters.mark"), database.transaction() as connection:
        found = list(connection.execute(sa.select(dead_letters.c.letter_id).where(here)).scalars())
        connection.execute(dead_letters.update().where(here).values(state=state))
    return found


def redrive(
    database: Database, handlers: Mapping[str, StreamHandler], origin: Callable[[DeadLetter], Record | None]
) -> bool:
    """Let the consumers of one process see again what a person asked for; tell whether there was any.

    `origin` gives the record that a letter is about, from where it lies. A letter whose event fails again is open again
    with the new reason; after MOST_REDRIVES it is in quarantine. What its handler gave is durable before the letter
    counts as redriven, so a crash repeats and never skips.
    """
    asked = read_dead_letters(database, _BATCH, states=(State.REDRIVE,), consumers=handlers)
    for letter in reversed(asked):
        reason = _try_again(database, origin(letter), letter, handlers[letter.consumer])
        failed = State.QUARANTINED if letter.redrives + 1 >= MOST_REDRIVES else State.OPEN
        state = State.REDRIVEN if reason is None else failed
        _settle(database, letter, state, reason or letter.reason)
    return bool(asked)


def _try_again(database: Database, record: Record | None, letter: DeadLetter, handler: StreamHandler) -> str | None:
    """Hand a letter's event to its handler; gives why that failed, None when it did not."""
    if record is None or hashlib.sha256(record.body).hexdigest() != letter.digest:
        return "the record is neither in the table of events nor, unchanged, where the letter says"
    try:
        publish(database, handler.handle(decode(record)), cause=record.key)
    except BusUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001  whatever it raises is the letter's new reason
        log.warning("deadletter.failedagain", consumer=letter.consumer, kind=letter.kind, error=describe(error))
        return reason_of(error)
    return None


def _settle(database: Database, letter: DeadLetter, state: State, reason: str) -> None:
    values = {"state": state, "redrives": letter.redrives + 1, "reason": reason}
    with effect("deadletters.settle"), database.transaction() as connection:
        connection.execute(dead_letters.update().where(dead_letters.c.letter_id == letter.letter_id).values(**values))
    log.info("deadletter.settled", consumer=letter.consumer, kind=letter.kind, state=str(state))
