"""Jobs and their operators."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import TEXT

revision, down_revision = "0001", None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "jobs",
        sa.Column("job_id", TEXT, primary_key=True),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("pipeline_id", TEXT, nullable=False),
        sa.Column("definition", sa.JSON, nullable=False),
        sa.Column("group_id", TEXT, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("attempt_class", sa.Integer, nullable=False),
        sa.Column("replay", TEXT, nullable=False),
        sa.Column("followed", TEXT, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("destinations", sa.JSON, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("retries", sa.Integer, nullable=False),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("requested", TEXT, nullable=False),
        sa.Column("started", TEXT, nullable=True),
        sa.Column("finished", TEXT, nullable=True),
        sa.Column("cause", TEXT, nullable=False),
        sa.Column("operator", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("result_set", sa.JSON, nullable=True),
    )
    op.create_table(
        "job_operators",
        sa.Column("job_id", TEXT, sa.ForeignKey("jobs.job_id"), primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("operator", TEXT, primary_key=True),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("started", TEXT, nullable=True),
        sa.Column("finished", TEXT, nullable=True),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("log", sa.JSON, nullable=True),
    )
    op.create_index("ix_jobs_group_id", "jobs", ["group_id"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
