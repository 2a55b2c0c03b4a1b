"""Called AE titles with their rules, made from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.errors import ConfigError
from clarion.loading import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from clarion.config import GatewayConfig
    from clarion.plugins import GroupingRule

RULES = "clarion.rules"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalledEntity:
    """A called AE title with the rule that groups what is sent to it."""

    ae_title: str
    rule_name: str
    rule: GroupingRule
    overwrite_same_instance: bool


def load_registry(config: GatewayConfig, on_fault: Callable[[int, str], None] | None = None) -> dict[str, CalledEntity]:
    """Load every rule. A rule that is unknown or refuses its settings goes to `on_fault`, else raises ConfigError."""
    entities: dict[str, CalledEntity] = {}
    for index, called in enumerate(config.ae_titles):
        try:
            rule: GroupingRule = build(RULES, called.rule, called.settings)
        except ConfigError as error:
            if on_fault is None:
                raise
            for fault in error.faults:
                on_fault(index, fault)
            continue
        entities[called.ae_title] = CalledEntity(
            ae_title=called.ae_title,
            rule_name=called.rule,
            rule=rule,
            overwrite_same_instance=called.overwrite_same_instance,
        )
    return entities
