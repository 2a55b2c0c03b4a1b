"""Stories of studies, and replays."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import BIG, TEXT

revision, down_revision = "0001", None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "timeline",
        sa.Column("position", BIG, primary_key=True, autoincrement=True),
        sa.Column("study_uid", TEXT, nullable=False),
        sa.Column("event_id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("subject", TEXT, nullable=False),
        sa.Column("parent", TEXT, nullable=False),
        sa.Column("time", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("text", TEXT, nullable=False),
        sa.UniqueConstraint("study_uid", "event_id"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "timeline_links",
        sa.Column("subject", TEXT, primary_key=True),
        sa.Column("study_uid", TEXT, primary_key=True),
    )
    op.create_index("ix_timeline_study_uid", "timeline", ["study_uid"])
