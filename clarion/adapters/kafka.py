"""What every client of the broker shares: how it is reached, and how a record is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clarion.codec import Record

if TYPE_CHECKING:
    from clarion.config import KafkaConfig

SESSION_S, HEARTBEAT_S = 10, 3
"""After what silence a member that was killed is no longer waited for by its group; how often a member speaks."""
METADATA_S = 10
"""How often a consumer asks which topics there are: one that was deleted and made again is noticed by that."""
_RECONNECT_MS = 1000
_BOOTSTRAP_MS = 5000


def client_settings(config: KafkaConfig) -> dict[str, Any]:
    """Give what every client of the broker needs: where it is, and how to be let in."""
    security = config.security
    settings: dict[str, Any] = {
        "bootstrap_servers": list(config.bootstrap),
        "security_protocol": security.protocol,
        "reconnect_backoff_max_ms": _RECONNECT_MS,
        "bootstrap_timeout_ms": _BOOTSTRAP_MS,
    }
    if security.ca_file is not None:
        settings["ssl_cafile"] = str(security.ca_file)
    if security.mechanism is not None:
        settings["sasl_mechanism"] = security.mechanism
        settings["sasl_plain_username"] = security.username
        settings["sasl_plain_password"] = security.password.get_secret_value() if security.password else None
    return settings


def record_at(found: Any) -> Record:  # noqa: ANN401  the client's record
    """Read a record as it lies in a topic, whoever wrote it: what is no text becomes something that is refused."""
    headers = {str(name): (value or b"").decode(errors="replace") for name, value in found.headers or ()}
    key = (found.key or b"").decode(errors="replace")
    return Record(key=key, headers=headers, body=found.value or b"")
