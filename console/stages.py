"""The processes of a running Clarion, in the order in which they drain, and how each of them is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from clarion.service import read_heartbeats

if TYPE_CHECKING:
    from clarion.config import Config
    from clarion.service import Heartbeat

STAGES = ("intake", "grouping", "streams", "orchestrator", "delivery", "console")
RELAY = "relay"
STOW = "stow"
# Records that wait in the journal for so long are not just on their way.
_BEHIND = timedelta(seconds=60)


def stages_of(config: Config) -> tuple[str, ...]:
    """Give the processes that a configuration needs: STOW-RS if wanted, on Kafka a relay after all that publish."""
    intake, *others, last = STAGES
    receiving = (intake, STOW) if config.gateway.stow is not None else (intake,)
    return (*receiving, *others, *((RELAY,) if config.bus.kind == "kafka" else ()), last)


def read_stages(config: Config) -> list[dict[str, Any]]:
    """Read how every stage is: `running`, `troubled` (its last step failed), `behind` (records wait) or `down`."""
    beats = {beat.stage: beat for beat in read_heartbeats(config.data / "run")}
    return [_stage(name, beats.get(name)) for name in stages_of(config)]


def _stage(name: str, beat: Heartbeat | None) -> dict[str, Any]:
    if beat is None:
        return {
            "stage": name,
            "state": "down",
            "alive": False,
            "pid": None,
            "trouble": "has not been started, or failed to",
        }
    described = {"stage": name, "alive": beat.alive, "pid": beat.pid, "trouble": beat.trouble, "facts": beat.facts}
    since = str(beat.facts.get("waiting_since", ""))
    if beat.state == "stopped":
        return {**described, "state": "down", "trouble": "was stopped in order"}
    if not beat.alive:
        return {**described, "state": "down", "trouble": "its process has ended or no longer speaks"}
    if beat.trouble:
        return {**described, "state": "troubled"}
    if since and datetime.now(UTC) - datetime.fromisoformat(since) > _BEHIND:
        return {**described, "state": "behind", "trouble": f"records wait since {since[:19]}"}
    return {**described, "state": "running"}
