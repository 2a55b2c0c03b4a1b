"""The outbox, positions of its readers, dead letters."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import BIG, TEXT

revision, down_revision = "0001", None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "consumers",
        sa.Column("consumer", TEXT, primary_key=True),
        sa.Column("position", BIG, nullable=False),
    )
    op.create_table(
        "dead_letters",
        sa.Column("consumer", TEXT, primary_key=True),
        sa.Column("origin", TEXT, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("position", BIG, primary_key=True),
        sa.Column("event_id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("error", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("time", TEXT, nullable=False),
        sa.Column("letter_id", TEXT, nullable=False, unique=True),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("redrives", sa.Integer, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("position", BIG, primary_key=True, autoincrement=True),
        sa.Column("event_id", TEXT, nullable=False, unique=True),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("time", TEXT, nullable=False),
        sa.Column("headers", TEXT, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_dead_letters_state", "dead_letters", ["state"])
    op.create_index("ix_events_kind", "events", ["kind"])
    op.create_index("ix_events_time", "events", ["time"])
    op.create_index("events_subject", "events", ["subject", "position"])
