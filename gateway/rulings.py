"""Asking a rule. It may be a stranger's: what it raises or wrongly answers concerns one instance or group only."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, timedelta
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import DBAPIError

from clarion.adapters.database import may_pass
from clarion.errors import InvalidInstanceError, describe
from clarion.model import PRIORITIES, Action, Decision, Trigger

if TYPE_CHECKING:
    from datetime import datetime

    from clarion.model import Group, Instance
    from gateway.registry import CalledEntity

log = structlog.get_logger()

# A rule that failed on a group, or was taken away, is asked again after this, and for so long.
RULE_RETRY = timedelta(seconds=60)
RULE_PATIENCE = timedelta(days=7)
RULE_FAILED, RULE_REMOVED, GROUPING_FAILED = "rule-failed", "rule-removed", "grouping-failed"
TROUBLES = frozenset((RULE_FAILED, RULE_REMOVED, GROUPING_FAILED))
"""Reasons for which a group waits though it may be complete."""
_MAX_KEY = 1024


def key_of(entity: CalledEntity | None, instance: Instance) -> tuple[str | None, str, str]:
    """Give the group key, the instance's state (`grouped`, `ignored`, `quarantined`) and the reason for it."""
    if entity is None:
        return None, "ignored", "called-ae-removed"
    try:
        key = entity.rule.group_of(instance)
        if key is not None and not _is_key(key):
            raise TypeError("group_of gave no key")
    except InvalidInstanceError as error:
        return None, "quarantined", error.reason
    except Exception as error:  # noqa: BLE001  whatever a stranger's rule raises
        log.error("rule.failed", rule=entity.rule_name, error=describe(error))  # noqa: TRY400  may quote patient data
        return None, "quarantined", RULE_FAILED
    return (None, "ignored", "no-rule-takes-it") if key is None else (key, "grouped", "")


def decide(entity: CalledEntity, group: Group, now: datetime) -> tuple[Decision, tuple[Trigger, ...]]:
    """Give the rule's decision about a group and, if it closes it, what that triggers.

    Lets pass what says that the database is away: that is not the rule's fault.
    """
    try:
        decision = entity.rule.is_complete(group, now)
        triggers = tuple(entity.rule.triggers(group)) if decision.action is Action.CLOSE else ()
        _check(decision, triggers)
        if decision.again is not None:
            decision = replace(decision, again=decision.again.astimezone(UTC))
    except Exception as error:
        if isinstance(error, DBAPIError) and may_pass(error):
            raise
        log.error("rule.failed", rule=entity.rule_name, group=group.group_id, error=describe(error))  # noqa: TRY400
        return _patiently(group, now, RULE_FAILED), ()
    return decision, triggers


def removed(group: Group, now: datetime) -> tuple[Decision, tuple[Trigger, ...]]:
    """Give the decision about a group whose rule is no longer in the configuration."""
    return _patiently(group, now, RULE_REMOVED), ()


def _patiently(group: Group, now: datetime, reason: str) -> Decision:
    """Wait for the rule to be mended; after RULE_PATIENCE give the group up. Its instances are kept."""
    if now > group.last_received + RULE_PATIENCE:
        return Decision(action=Action.DISCARD, reason=f"{reason} for {RULE_PATIENCE.days} days")
    return Decision(action=Action.WAIT, reason=reason, again=now + RULE_RETRY)


def _is_key(key: object) -> bool:
    return isinstance(key, str) and 0 < len(key) <= _MAX_KEY and key.encode("utf-8", "replace").decode() == key


def _check(decision: object, triggers: tuple[object, ...]) -> None:
    """Raise TypeError when an answer is not what the contract says."""
    if not isinstance(decision, Decision) or not isinstance(decision.action, Action):
        raise TypeError("is_complete did not give a Decision")
    if decision.again is not None and decision.again.tzinfo is None:
        raise TypeError("Decision.again has no time zone")
    if not isinstance(decision.reason, str):
        raise TypeError("Decision.reason is not text")
    for one in triggers:
        if not isinstance(one, Trigger) or not all(map(_is_key, (one.pipeline_id, one.name))):
            raise TypeError("triggers did not give Triggers with a pipeline and a name")
        if one.priority not in PRIORITIES:
            raise TypeError(f"Trigger.priority is none of {', '.join(PRIORITIES)}")
