"""The gateway's tables. No other stage reads them; the console does through `gateway.queries`.

received = grouped + ignored + quarantined, per study: `instances` holds the first two and conflicts, `ignored` those
whose SOP Class is not kept at all, `quarantine` the third; `removals` counts what retention has taken of either.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from clarion.adapters.database import BIG, TEXT
from clarion.adapters.schema import Schema

SCHEMA = Schema(stage="gateway", folder=Path(__file__).parent / "migrations", head="0005")

metadata = sa.MetaData()

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("study_uid", TEXT, primary_key=True),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("first_received", TEXT, nullable=False),
    sa.Column("last_received", TEXT, nullable=False, index=True),
    sa.Index("studies_received", "first_received", "study_uid"),
)

instances = sa.Table(
    "instances",
    metadata,
    sa.Column("sop_instance_uid", TEXT, primary_key=True),
    sa.Column("digest", TEXT, primary_key=True),
    sa.Column("study_uid", TEXT, nullable=False, index=True),
    sa.Column("series_uid", TEXT, nullable=False),
    sa.Column("sop_class_uid", TEXT, nullable=False),
    sa.Column("transfer_syntax_uid", TEXT, nullable=False),
    sa.Column("calling_ae", TEXT, nullable=False),
    sa.Column("called_ae", TEXT, nullable=False),
    sa.Column("received", TEXT, nullable=False),
    sa.Column("object", sa.JSON, nullable=False),
    sa.Column("attributes", sa.JSON, nullable=False),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False, default=""),
    sa.Column("conflicted", sa.Boolean, nullable=False, default=False),
    # What is kept by how long ago it came, and by nothing else: few of all.
    *(
        sa.Index(name, "received", sqlite_where=sa.text(only), postgresql_where=sa.text(only))
        for name, only in (("instances_ignored", "state = 'ignored'"), ("instances_conflicted", "conflicted"))
    ),
)

quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column("quarantine_id", TEXT, primary_key=True),
    sa.Column("study_uid", TEXT, nullable=False, index=True),
    sa.Column("sop_instance_uid", TEXT, nullable=False),
    sa.Column("sop_class_uid", TEXT, nullable=False),
    sa.Column("transfer_syntax_uid", TEXT, nullable=False),
    sa.Column("calling_ae", TEXT, nullable=False),
    sa.Column("called_ae", TEXT, nullable=False),
    sa.Column("received", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False),
    sa.Column("object", sa.JSON, nullable=True),
    sa.Index("quarantine_received", "received"),
)

ignored = sa.Table(
    "ignored",
    metadata,
    sa.Column("ignored_id", TEXT, primary_key=True),
    sa.Column("study_uid", TEXT, nullable=False, index=True),
    sa.Column("sop_instance_uid", TEXT, nullable=False),
    sa.Column("sop_class_uid", TEXT, nullable=False),
    sa.Column("called_ae", TEXT, nullable=False),
    sa.Column("received", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False),
)

groups = sa.Table(
    "groups",
    metadata,
    sa.Column("group_id", TEXT, primary_key=True),
    sa.Column("called_ae", TEXT, nullable=False),
    sa.Column("rule", TEXT, nullable=False),
    sa.Column("key", TEXT, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("opened", TEXT, nullable=False),
    sa.Column("last_received", TEXT, nullable=False),
    sa.Column("closed", TEXT, nullable=True),
    # When its rule is asked again; of a group that has ended, when its retention is looked at again.
    sa.Column("check_at", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False, default=""),
    # By whom and why it is no longer kept for jobs that failed or were never requested; empty when it is.
    sa.Column("released", TEXT, nullable=False, server_default=""),
    sa.UniqueConstraint("called_ae", "rule", "key", "epoch"),
    sa.Index("groups_due", "state", "check_at"),
)

members = sa.Table(
    "group_members",
    metadata,
    sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
    sa.Column("sop_instance_uid", TEXT, primary_key=True),
    sa.Column("digest", TEXT, nullable=False),
    sqlite_with_rowid=False,
)

# The studies that have instances in a group.
group_studies = sa.Table(
    "group_studies",
    metadata,
    sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
    sa.Column("study_uid", TEXT, primary_key=True, index=True),
)

revisions = sa.Table(
    "group_revisions",
    metadata,
    sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
    sa.Column("revision", sa.Integer, primary_key=True),
    sa.Column("manifest", sa.JSON, nullable=False),
    sa.Column("manifest_digest", TEXT, nullable=False),
    sa.Column("instances", sa.Integer, nullable=False),
    sa.Column("closed", TEXT, nullable=False),
    # How many pipelines it triggered; None while that is not known of one that an older version closed.
    sa.Column("pipelines", sa.Integer, nullable=True),
)

# The jobs on groups, as their events told; what is not known yet of the group is empty.
group_jobs = sa.Table(
    "group_jobs",
    metadata,
    sa.Column("job_id", TEXT, primary_key=True),
    sa.Column("group_id", TEXT, nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("pipeline_id", TEXT, nullable=False),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("changed", TEXT, nullable=False),
)

# Groups whose instances a replay that is planned or runs may need.
group_holds = sa.Table(
    "group_holds",
    metadata,
    sa.Column("replay_id", TEXT, primary_key=True),
    sa.Column("group_id", TEXT, primary_key=True, index=True),
    # None until the replay has ended; then for some time yet.
    sa.Column("until", TEXT, nullable=True),
)

# What retention has removed of a study: how many that were grouped, ignored or quarantined.
removals = sa.Table(
    "removals",
    metadata,
    sa.Column("study_uid", TEXT, primary_key=True),
    sa.Column("state", TEXT, primary_key=True),
    sa.Column("instances", sa.Integer, nullable=False),
)

# When it was said that what was set aside before `until` will be removed.
notices = sa.Table(
    "quarantine_notices",
    metadata,
    sa.Column("told", TEXT, primary_key=True),
    sa.Column("until", TEXT, nullable=False),
)

# When retention looked at the clock last, and since when it does not believe it.
retention_marks = sa.Table(
    "retention_marks",
    metadata,
    sa.Column("name", TEXT, primary_key=True),
    sa.Column("time", TEXT, nullable=False),
)

# Objects to which no row refers any more, until their bytes are gone. Of a duplicate, `instead` is the copy that is
# kept: should that be damaged, the duplicate takes its place.
unwanted = sa.Table(
    "unwanted_objects",
    metadata,
    sa.Column("location", TEXT, primary_key=True),
    sa.Column("object", sa.JSON, nullable=False),
    sa.Column("instead", sa.JSON, nullable=True),
)

journal_positions = sa.Table(
    "journal_positions",
    metadata,
    sa.Column("reader", TEXT, primary_key=True),
    sa.Column("log", TEXT, primary_key=True),
    sa.Column("segment", sa.Integer, nullable=False),
    sa.Column("offset", BIG, nullable=False),
)

# How much of a segment of the journal no row of the other tables refers to; none is listed that has no such bytes.
segment_waste = sa.Table(
    "segment_waste",
    metadata,
    sa.Column("log", TEXT, primary_key=True),
    sa.Column("segment", sa.Integer, primary_key=True),
    sa.Column("bytes", BIG, nullable=False),
)

commitments = sa.Table(
    "commitments",
    metadata,
    sa.Column("transaction_uid", TEXT, primary_key=True),
    sa.Column("peer", TEXT, nullable=False),
    sa.Column("received", TEXT, nullable=False),
    sa.Column("stored", sa.JSON, nullable=False),
    sa.Column("failed", sa.JSON, nullable=False),
)

# What peers asked us to commit to, and whether they have been told.
commitment_answers = sa.Table(
    "commitment_answers",
    metadata,
    sa.Column("transaction_uid", TEXT, primary_key=True),
    sa.Column("peer", TEXT, primary_key=True),
    sa.Column("asked", TEXT, nullable=False),
    sa.Column("stored", sa.JSON, nullable=False),
    sa.Column("failed", sa.JSON, nullable=False),
    sa.Column("state", TEXT, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False, default=""),
    sa.Index("commitment_answers_due", "state", "due"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("delivery_id", TEXT, primary_key=True),
    sa.Column("job_id", TEXT, nullable=False, index=True),
    sa.Column("destination", TEXT, nullable=False),
    sa.Column("result_set", sa.JSON, nullable=False),
    sa.Column("state", TEXT, nullable=False, index=True),
    sa.Column("sequence", sa.Integer, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    # Attempts that do not count: before a person asked for more, or while the destination was not reached.
    sa.Column("spent", sa.Integer, nullable=False, default=0),
    sa.Column("due", TEXT, nullable=False),
    sa.Column("requested", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False, default=""),
    sa.Column("transaction_uid", TEXT, nullable=True),
    sa.Column("verify_until", TEXT, nullable=True),
    # The last order of a replay that was followed: seen again, it is passed over.
    sa.Column("followed", TEXT, nullable=False, default=""),
)

# Destinations that are not reached: since when, and when that was tried last.
outages = sa.Table(
    "outages",
    metadata,
    sa.Column("destination", TEXT, primary_key=True),
    sa.Column("since", TEXT, nullable=False),
    sa.Column("tried", TEXT, nullable=False),
)

# Jobs whose results must not leave any more; kept, since the request of their delivery may come later.
superseded_jobs = sa.Table(
    "superseded_jobs",
    metadata,
    sa.Column("job_id", TEXT, primary_key=True),
    sa.Column("by", TEXT, nullable=False),
)

delivery_instances = sa.Table(
    "delivery_instances",
    metadata,
    sa.Column("delivery_id", TEXT, sa.ForeignKey("deliveries.delivery_id"), primary_key=True),
    sa.Column("sop_instance_uid", TEXT, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("described", sa.JSON, nullable=False),
    sa.Column("status", sa.Integer, nullable=True),
    sa.Column("note", TEXT, nullable=False, default=""),
)
