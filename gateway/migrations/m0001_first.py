"""Studies, instances, groups, deliveries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from clarion.adapters.database import BIG, TEXT

revision, down_revision = "0001", None


def upgrade() -> None:
    """Make the tables."""
    _commitments()
    _commitment_answers()
    _deliveries()
    _groups()
    _ignored()
    _instances()
    _journal_positions()
    _quarantine()
    _studies()
    _superseded_jobs()
    _delivery_instances()
    _group_members()
    _group_revisions()


def _commitments() -> None:
    op.create_table(
        "commitments",
        sa.Column("transaction_uid", TEXT, primary_key=True),
        sa.Column("peer", TEXT, nullable=False),
        sa.Column("received", TEXT, nullable=False),
        sa.Column("stored", sa.JSON, nullable=False),
        sa.Column("failed", sa.JSON, nullable=False),
    )


def _commitment_answers() -> None:
    op.create_table(
        "commitment_answers",
        sa.Column("transaction_uid", TEXT, primary_key=True),
        sa.Column("peer", TEXT, primary_key=True),
        sa.Column("asked", TEXT, nullable=False),
        sa.Column("stored", sa.JSON, nullable=False),
        sa.Column("failed", sa.JSON, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
    )
    op.create_index("commitment_answers_due", "commitment_answers", ["state", "due"])


def _deliveries() -> None:
    op.create_table(
        "deliveries",
        sa.Column("delivery_id", TEXT, primary_key=True),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("destination", TEXT, nullable=False),
        sa.Column("result_set", sa.JSON, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("spent", sa.Integer, nullable=False),
        sa.Column("due", TEXT, nullable=False),
        sa.Column("requested", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("transaction_uid", TEXT, nullable=True),
        sa.Column("verify_until", TEXT, nullable=True),
        sa.Column("followed", TEXT, nullable=False),
    )
    op.create_index("ix_deliveries_job_id", "deliveries", ["job_id"])
    op.create_index("ix_deliveries_state", "deliveries", ["state"])


def _groups() -> None:
    op.create_table(
        "groups",
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
        sa.Column("check_at", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.UniqueConstraint("called_ae", "rule", "key", "epoch"),
    )
    op.create_index("groups_due", "groups", ["state", "check_at"])


def _ignored() -> None:
    op.create_table(
        "ignored",
        sa.Column("ignored_id", TEXT, primary_key=True),
        sa.Column("study_uid", TEXT, nullable=False),
        sa.Column("sop_instance_uid", TEXT, nullable=False),
        sa.Column("sop_class_uid", TEXT, nullable=False),
        sa.Column("called_ae", TEXT, nullable=False),
        sa.Column("received", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
    )
    op.create_index("ix_ignored_study_uid", "ignored", ["study_uid"])


def _instances() -> None:
    op.create_table(
        "instances",
        sa.Column("sop_instance_uid", TEXT, primary_key=True),
        sa.Column("digest", TEXT, primary_key=True),
        sa.Column("study_uid", TEXT, nullable=False),
        sa.Column("series_uid", TEXT, nullable=False),
        sa.Column("sop_class_uid", TEXT, nullable=False),
        sa.Column("transfer_syntax_uid", TEXT, nullable=False),
        sa.Column("calling_ae", TEXT, nullable=False),
        sa.Column("called_ae", TEXT, nullable=False),
        sa.Column("received", TEXT, nullable=False),
        sa.Column("object", sa.JSON, nullable=False),
        sa.Column("attributes", sa.JSON, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("conflicted", sa.Boolean, nullable=False),
    )
    op.create_index("ix_instances_study_uid", "instances", ["study_uid"])


def _journal_positions() -> None:
    op.create_table(
        "journal_positions",
        sa.Column("reader", TEXT, primary_key=True),
        sa.Column("log", TEXT, primary_key=True),
        sa.Column("segment", sa.Integer, nullable=False),
        sa.Column("offset", BIG, nullable=False),
    )


def _quarantine() -> None:
    op.create_table(
        "quarantine",
        sa.Column("quarantine_id", TEXT, primary_key=True),
        sa.Column("study_uid", TEXT, nullable=False),
        sa.Column("sop_instance_uid", TEXT, nullable=False),
        sa.Column("sop_class_uid", TEXT, nullable=False),
        sa.Column("transfer_syntax_uid", TEXT, nullable=False),
        sa.Column("calling_ae", TEXT, nullable=False),
        sa.Column("called_ae", TEXT, nullable=False),
        sa.Column("received", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("object", sa.JSON, nullable=True),
    )
    op.create_index("ix_quarantine_study_uid", "quarantine", ["study_uid"])


def _studies() -> None:
    op.create_table(
        "studies",
        sa.Column("study_uid", TEXT, primary_key=True),
        sa.Column("sequence", sa.Integer, nullable=False),
        sa.Column("first_received", TEXT, nullable=False),
        sa.Column("last_received", TEXT, nullable=False),
    )
    op.create_index("ix_studies_last_received", "studies", ["last_received"])
    op.create_index("studies_received", "studies", ["first_received", "study_uid"])


def _superseded_jobs() -> None:
    op.create_table(
        "superseded_jobs",
        sa.Column("job_id", TEXT, primary_key=True),
        sa.Column("by", TEXT, nullable=False),
    )


def _delivery_instances() -> None:
    op.create_table(
        "delivery_instances",
        sa.Column("delivery_id", TEXT, sa.ForeignKey("deliveries.delivery_id"), primary_key=True),
        sa.Column("sop_instance_uid", TEXT, primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("described", sa.JSON, nullable=False),
        sa.Column("status", sa.Integer, nullable=True),
        sa.Column("note", TEXT, nullable=False),
    )


def _group_members() -> None:
    op.create_table(
        "group_members",
        sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
        sa.Column("sop_instance_uid", TEXT, primary_key=True),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("study_uid", TEXT, nullable=False),
    )
    op.create_index("ix_group_members_study_uid", "group_members", ["study_uid"])


def _group_revisions() -> None:
    op.create_table(
        "group_revisions",
        sa.Column("group_id", TEXT, sa.ForeignKey("groups.group_id"), primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("manifest_digest", TEXT, nullable=False),
        sa.Column("instances", sa.Integer, nullable=False),
        sa.Column("closed", TEXT, nullable=False),
    )
