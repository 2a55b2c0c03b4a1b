"""What decides how long received instances are kept, what was removed, and what of it still lies on the disk."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import TEXT

revision, down_revision = "0005", "0004"


def upgrade() -> None:
    """Make the tables; how many jobs an older revision asked for is read from its event."""
    op.create_table(
        "group_jobs",
        sa.Column("job_id", TEXT, primary_key=True),
        sa.Column("group_id", TEXT, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("pipeline_id", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("changed", TEXT, nullable=False),
    )
    op.create_index("ix_group_jobs_group_id", "group_jobs", ["group_id"])
    op.create_table(
        "group_holds",
        sa.Column("replay_id", TEXT, primary_key=True),
        sa.Column("group_id", TEXT, primary_key=True),
        sa.Column("until", TEXT, nullable=True),
    )
    op.create_index("ix_group_holds_group_id", "group_holds", ["group_id"])
    op.create_table(
        "removals",
        sa.Column("study_uid", TEXT, primary_key=True),
        sa.Column("state", TEXT, primary_key=True),
        sa.Column("instances", sa.Integer, nullable=False),
    )
    op.create_table(
        "unwanted_objects",
        sa.Column("location", TEXT, primary_key=True),
        sa.Column("object", sa.JSON, nullable=False),
        sa.Column("instead", sa.JSON, nullable=True),
    )
    op.create_table(
        "quarantine_notices",
        sa.Column("told", TEXT, primary_key=True),
        sa.Column("until", TEXT, nullable=False),
    )
    op.create_table(
        "retention_marks", sa.Column("name", TEXT, primary_key=True), sa.Column("time", TEXT, nullable=False)
    )
    op.add_column("groups", sa.Column("released", TEXT, nullable=False, server_default=""))
    op.add_column("group_revisions", sa.Column("pipelines", sa.Integer, nullable=True))
    op.create_index("quarantine_received", "quarantine", ["received"])
    for name, condition in (("ignored", "state = 'ignored'"), ("conflicted", "conflicted")):
        only = sa.text(condition)
        op.create_index(f"instances_{name}", "instances", ["received"], sqlite_where=only, postgresql_where=only)
