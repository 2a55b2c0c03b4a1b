"""Since when destinations have not been reached."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import TEXT

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "outages",
        sa.Column("destination", TEXT, primary_key=True),
        sa.Column("since", TEXT, nullable=False),
        sa.Column("tried", TEXT, nullable=False),
    )
