"""`clarion deadletters`: look at what handlers gave up, let them see it again, or say that it does not matter."""

from __future__ import annotations

import collections
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clarion.adapters.deadletters import DeadLetter, State, mark, read_dead_letters
from clarion.adapters.outbox import find_record
from clarion.errors import ConfigError, PermanentError

if TYPE_CHECKING:
    from clarion.adapters.database import Database

_ALL = 100_000


def show_letters(letters: list[DeadLetter]) -> None:
    """Print letters for a person, and how many there are of each reason."""
    screen = Console()
    table = Table(box=None)
    for column in ("id", "state", "time", "consumer", "event", "reason"):
        table.add_column(column, overflow="fold")
    for one in letters:
        table.add_row(one.letter_id, one.state, one.time[:19], one.consumer, one.kind, escape(one.reason))
    screen.print(table)
    for reason, count in collections.Counter(f"{one.error}: {one.reason}" for one in letters).most_common():
        screen.print(f"{count:>6} of {escape(reason)}", highlight=False)


def describe_letter(database: Database, letter_id: str) -> dict[str, Any]:
    """Give a letter, and how large its event's body is; the body stays masked."""
    found = read_dead_letters(database, states=list(State), letter_ids=[letter_id])
    if not found:
        raise PermanentError(f"no dead letter {letter_id}; `clarion deadletters list` shows those there are")
    record = find_record(database, found[0].subject, found[0].event_id)
    return {**asdict(found[0]), "body_bytes": None if record is None else len(record.body), "body": "masked"}


def choose(database: Database, letter_ids: list[str], *, everything: bool, consumer: str | None) -> list[DeadLetter]:
    """Choose letters by id, by consumer, or all that ask for attention; those in quarantine only by id.

    Raises ConfigError when nothing or too much is said, PermanentError for an id that there is not.
    """
    if bool(letter_ids) + everything + (consumer is not None) != 1:
        raise ConfigError(["name letters by id, or say --all, or --consumer NAME"])
    there = read_dead_letters(database, _ALL, letter_ids=letter_ids or None)
    if letter_ids:
        unknown = sorted(set(letter_ids) - {one.letter_id for one in there})
        if unknown:
            raise PermanentError(f"no dead letter {unknown[0]} that asks for attention")
        return there
    return [one for one in there if one.state != State.QUARANTINED and (everything or one.consumer == consumer)]


def put(database: Database, chosen: list[DeadLetter], state: State, *, dry_run: bool) -> dict[str, Any]:
    """Put letters into a state; says which, or which would be."""
    ids = [one.letter_id for one in chosen]
    return {"dry_run": dry_run, "state": str(state), "letters": ids if dry_run else mark(database, ids, state)}
