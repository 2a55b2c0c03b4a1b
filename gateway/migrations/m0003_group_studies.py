"""Which studies a group has, in a table of its own: asked for with each of its events, and the same for all members."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import TEXT

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    """Make the table of what the members say; let those be without it, and in one tree instead of three."""
    op.create_table(
        "group_studies",
        sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
        sa.Column("study_uid", TEXT, primary_key=True),
    )
    op.create_index("ix_group_studies_study_uid", "group_studies", ["study_uid"])
    op.execute("INSERT INTO group_studies SELECT DISTINCT group_id, study_uid FROM group_members")
    if op.get_bind().dialect.name == "postgresql":
        op.drop_column("group_members", "study_uid")
        return
    op.create_table(
        "group_members_new",
        sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
        sa.Column("sop_instance_uid", TEXT, primary_key=True),
        sa.Column("digest", TEXT, nullable=False),
        sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO group_members_new SELECT group_id, sop_instance_uid, digest FROM group_members")
    op.drop_table("group_members")
    op.rename_table("group_members_new", "group_members")
