"""Stories of studies, and replays."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import BIG, TEXT

revision, down_revision = "0001", None


def upgrade() -> None:
    """Make the tables."""
    _replays()
    _timeline()
    _timeline_links()
    _replay_items()
    _replay_spans()


def _replays() -> None:
    op.create_table(
        "replays",
        sa.Column("replay_id", TEXT, primary_key=True),
        sa.Column("mode", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("planned_by", TEXT, nullable=False),
        sa.Column("created", TEXT, nullable=False),
        sa.Column("selection", sa.JSON, nullable=False),
        sa.Column("destinations", sa.JSON, nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("window_start", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("note", TEXT, nullable=False),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("run_by", TEXT, nullable=False),
        sa.Column("started", TEXT, nullable=True),
        sa.Column("finished", TEXT, nullable=True),
        sa.Column("records_read", BIG, nullable=False),
    )
    op.create_index("ix_replays_state", "replays", ["state"])


def _timeline() -> None:
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
    op.create_index("ix_timeline_study_uid", "timeline", ["study_uid"])
    op.create_index("ix_timeline_subject", "timeline", ["subject"])


def _timeline_links() -> None:
    op.create_table(
        "timeline_links",
        sa.Column("subject", TEXT, primary_key=True),
        sa.Column("study_uid", TEXT, primary_key=True),
    )


def _replay_items() -> None:
    op.create_table(
        "replay_items",
        sa.Column("replay_id", TEXT, sa.ForeignKey("replays.replay_id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("study_uid", TEXT, nullable=False),
        sa.Column("group_id", TEXT, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("pipeline_id", TEXT, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("target", TEXT, nullable=False),
        sa.Column("destination", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("minutes", sa.Float, nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.Column("source_event", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("note", TEXT, nullable=False),
        sa.Column("ordered", TEXT, nullable=True),
        sa.Column("ended", TEXT, nullable=True),
    )
    op.create_index("replay_items_source", "replay_items", ["replay_id", "source_event"])
    op.create_index("replay_items_state", "replay_items", ["replay_id", "state", "number"])


def _replay_spans() -> None:
    op.create_table(
        "replay_spans",
        sa.Column("replay_id", TEXT, sa.ForeignKey("replays.replay_id"), primary_key=True),
        sa.Column("origin", TEXT, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True),
        sa.Column("start", BIG, nullable=False),
        sa.Column("position", BIG, nullable=False),
        sa.Column("end", BIG, nullable=False),
    )
