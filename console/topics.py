"""What a command needs to know of Kafka before it starts: that it is configured, and that its topics are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from clarion.errors import BusUnavailableError, ConfigError

if TYPE_CHECKING:
    from clarion.config import Config, KafkaConfig

log = structlog.get_logger()


def kafka_of(config: Config) -> KafkaConfig:
    """Give the configuration of Kafka. Raises ConfigError when the bus is another."""
    if config.bus.kind != "kafka" or config.bus.kafka is None:
        raise ConfigError(["bus.kind: is embedded; there are topics only with kafka"])
    return config.bus.kafka


def require_topics(config: Config) -> None:
    """Refuse to start without the topics. A broker that is down is no reason: what is received waits in the outbox."""
    if config.bus.kind != "kafka":
        return
    from clarion.adapters.kafka_topics import check_topics  # noqa: PLC0415  an extra

    try:
        faults = check_topics(kafka_of(config))
    except BusUnavailableError as error:
        log.warning("topics.unchecked", reason=str(error))
        return
    missing = [one for one in faults if one.endswith("is missing")]
    if missing:
        raise ConfigError([*missing, "make them with `clarion topics apply`"])
    for fault in faults:
        log.warning("topics.differ", reason=fault)
