"""The streams' tables: stories of studies, and replays. No other stage reads them; the console does by queries."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from clarion.adapters.database import BIG, TEXT
from clarion.adapters.schema import Schema

SCHEMA = Schema(stage="streams", folder=Path(__file__).parent / "migrations", head="0001")

metadata = sa.MetaData()

timeline = sa.Table(
    "timeline",
    metadata,
    sa.Column("position", BIG, primary_key=True, autoincrement=True),
    sa.Column("study_uid", TEXT, nullable=False, index=True),
    sa.Column("event_id", TEXT, nullable=False),
    sa.Column("kind", TEXT, nullable=False),
    sa.Column("subject", TEXT, nullable=False, index=True),
    sa.Column("parent", TEXT, nullable=False),
    sa.Column("time", TEXT, nullable=False),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("text", TEXT, nullable=False),
    sa.UniqueConstraint("study_uid", "event_id"),
    sqlite_autoincrement=True,
)

links = sa.Table(
    "timeline_links",
    metadata,
    sa.Column("subject", TEXT, primary_key=True),
    sa.Column("study_uid", TEXT, primary_key=True),
)

# A plan never changes; what changes is its state, and that of its items.
replays = sa.Table(
    "replays",
    metadata,
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
    sa.Column("state", TEXT, nullable=False, index=True),
    sa.Column("note", TEXT, nullable=False),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("run_by", TEXT, nullable=False),
    sa.Column("started", TEXT, nullable=True),
    sa.Column("finished", TEXT, nullable=True),
    sa.Column("records_read", BIG, nullable=False),
)

replay_items = sa.Table(
    "replay_items",
    metadata,
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
    # The event that is handed over or published, as its record's body; and the one it follows from.
    sa.Column("body", TEXT, nullable=False),
    sa.Column("source_event", TEXT, nullable=False),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("note", TEXT, nullable=False),
    sa.Column("ordered", TEXT, nullable=True),
    sa.Column("ended", TEXT, nullable=True),
    sa.Index("replay_items_state", "replay_id", "state", "number"),
    sa.Index("replay_items_source", "replay_id", "source_event"),
)

# How far a replay has read each place that the events lie in.
replay_spans = sa.Table(
    "replay_spans",
    metadata,
    sa.Column("replay_id", TEXT, sa.ForeignKey("replays.replay_id"), primary_key=True),
    sa.Column("origin", TEXT, primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("start", BIG, nullable=False),
    sa.Column("position", BIG, nullable=False),
    sa.Column("end", BIG, nullable=False),
)
