"""How much of each segment of the journal is not wanted: only where that is something, a segment is looked at."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import BIG, TEXT

revision, down_revision = "0004", "0003"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "segment_waste",
        sa.Column("log", TEXT, primary_key=True),
        sa.Column("segment", sa.Integer, primary_key=True),
        sa.Column("bytes", BIG, nullable=False),
    )
