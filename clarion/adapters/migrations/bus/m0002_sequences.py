"""Events are told apart by subject, sequence and type instead of by their id.

An id is derived from the three, and so as good as random: an index of ids wrote a page for each event.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import BIG, TEXT

revision, down_revision = "0002", "0001"

_KEPT = "position, event_id, kind, subject, time, headers, body"


def upgrade() -> None:
    """Give each event its sequence, as its body says it; change the indexes."""
    if op.get_bind().dialect.name == "postgresql":
        _on_postgresql()
    else:
        _on_sqlite()
    op.create_index("events_sequence", "events", ["subject", "sequence", "kind"], unique=True)


def _on_postgresql() -> None:
    op.drop_index("events_subject", "events")
    op.drop_constraint("events_event_id_key", "events")
    op.add_column("events", sa.Column("sequence", BIG, nullable=True))
    # One pass over the table, and no dead copy of each row.
    said = "substring(convert_from(body, 'UTF8') from '\"sequence\":([0-9]+)')::bigint"
    op.execute(f"ALTER TABLE events ALTER COLUMN sequence TYPE bigint USING ({said})")
    op.alter_column("events", "sequence", nullable=False)


def _on_sqlite() -> None:
    """SQLite drops no constraint: the table is written anew."""
    op.create_table(
        "events_new",
        sa.Column("position", BIG, primary_key=True, autoincrement=True),
        sa.Column("event_id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("sequence", BIG, nullable=False),
        sa.Column("time", TEXT, nullable=False),
        sa.Column("headers", TEXT, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.execute(
        f"INSERT INTO events_new ({_KEPT}, sequence) "  # noqa: S608  names of our own
        f"SELECT {_KEPT}, json_extract(CAST(body AS TEXT), '$.sequence') FROM events ORDER BY position"
    )
    # Positions go on where they were, also behind events that were deleted.
    op.execute("DELETE FROM sqlite_sequence WHERE name = 'events_new'")
    op.execute("INSERT INTO sqlite_sequence SELECT 'events_new', seq FROM sqlite_sequence WHERE name = 'events'")
    op.drop_table("events")
    op.rename_table("events_new", "events")
    op.create_index("ix_events_kind", "events", ["kind"])
    op.create_index("ix_events_time", "events", ["time"])
