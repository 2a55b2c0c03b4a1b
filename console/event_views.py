"""Events as a person may see them: masked, short, in order."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clarion.adapters.deadletters import count_by_reason
from clarion.adapters.history import count_events, find_event, last_position, list_events
from clarion.adapters.topics import TOPICS, family_of
from clarion.errors import PermanentError
from console.carriage import look
from streams.queries import subjects_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from clarion.adapters.database import Database
    from clarion.adapters.history import EventRow
    from clarion.config import Config

_LOOK_S = 0.5
_SHOWN = 14
# A DICOM UID says which study of which hospital it is; its end is enough to tell two apart.
_UID = re.compile(r"\b[0-2](?:\.[0-9]+){3,}\b")


def mask(text: str) -> str:
    """Shorten every UID to its end."""
    return _UID.sub(lambda found: f"…{found[0][-_SHOWN:]}" if len(found[0]) > _SHOWN else found[0], text)


def describe_event(row: EventRow, *, unmask: bool) -> dict[str, Any]:
    """Give an event as JSON holds it."""
    described = {
        "position": row.position,
        "event_id": row.event_id,
        "type": row.kind,
        "topic": family_of(row.kind),
        "subject": row.record.key,
        "time": row.time,
        "trace_id": row.record.headers.get("traceparent", "")[3:35],
        "body": json.loads(row.record.body),
    }
    return described if unmask else json.loads(mask(json.dumps(described)))


def subjects(database: Database, study: str | None, group: str | None) -> list[str] | None:
    """Give what the events must be about; None when that is not asked for."""
    if study is None and group is None:
        return None
    return sorted({*(subjects_of(database, study) if study else ()), *([group] if group else ())})


def show_event(database: Database, event_id: str, *, unmask: bool) -> dict[str, Any]:
    """Give one event. Raises PermanentError when there is none, or several begin so."""
    row = find_event(database, event_id)
    if row is None:
        raise PermanentError(f"no event {event_id!r}, or several begin so; `clarion events tail` shows the latest")
    return describe_event(row, unmask=unmask)


def tail(
    database: Database,
    limit: int,
    *,
    about: Callable[[], list[str] | None],
    kinds: Iterable[str],
    follow: bool,
    say: Callable[[EventRow], None],
) -> None:
    """Say the latest events, then, if asked to, those that come, until Ctrl-C."""
    chosen = tuple(kinds)
    position = last_position(database)
    for row in list_events(database, limit, kinds=chosen, subjects=about()):
        say(row)
        position = max(position, row.position)
    while follow:
        time.sleep(_LOOK_S)
        for row in list_events(database, 1000, after=position, kinds=chosen, subjects=about()):
            say(row)
            position = row.position


def line_of(row: EventRow, *, unmask: bool) -> str:
    """Say an event in one line."""
    subject = row.record.key if unmask else mask(row.record.key)
    fields = {**json.loads(row.record.body)}
    for name in ("subject", "sequence", "time", "source", "studies", "manifest", "object", "definition", "result_set"):
        fields.pop(name, None)
    plain = {name: one for name, one in fields.items() if isinstance(one, str | int) and not name.endswith("digest")}
    said = " ".join(f"{name}={value}" for name, value in plain.items() if value != "")
    return f"{row.time[:19]}  {row.kind:<24} {subject:<38} {said if unmask else mask(said)}"


def read_statistics(config: Config, database: Database) -> dict[str, Any]:
    """Count what there is and what waits: events by type and topic, handlers behind, relay, dead letters by reason."""
    counts = count_events(database)
    topics = {name: sum(count for kind, count in counts.items() if family_of(kind) == name) for name in TOPICS}
    letters = [
        {"consumer": consumer, "state": state, "reason": reason, "count": count}
        for consumer, state, reason, count in count_by_reason(database)
    ]
    carried = look(config, database)
    return {
        "events": counts,
        "topics": topics,
        "dead_letters": letters,
        "broker": carried.broker,
        "relay": carried.relay,
        "consumers": {one.consumer: one.behind for one in carried.consumers},
    }


def show_statistics(found: dict[str, Any]) -> None:
    """Print the counts for a person."""
    screen = Console()
    table = Table(box=None)
    for column in ("type", "topic", "events"):
        table.add_column(column, justify="right" if column == "events" else "left")
    for kind, count in found["events"].items():
        table.add_row(kind, family_of(kind), str(count))
    screen.print(table)
    late = ", ".join(f"{name} {count}" for name, count in found["consumers"].items() if count) or "nobody"
    screen.print(f"behind: {late}", highlight=False)
    if found["relay"] is not None:
        relay = found["relay"]
        screen.print(f"not in Kafka yet: {relay['backlog']}, the oldest since {relay['oldest_seconds']:.0f} s")
    if found["broker"] != "ok":
        screen.print(f"[red]{escape(found['broker'])}[/]")
    for one in found["dead_letters"]:
        screen.print(f"{one['count']:>6} dead letters of {one['consumer']}: {escape(one['reason'])}", highlight=False)
