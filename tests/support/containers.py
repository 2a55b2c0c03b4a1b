"""Servers in containers: for a machine that has an engine and not the server itself. Nothing here is made at import."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def engine() -> bool:
    """Tell whether a container engine answers; a `docker` command without an engine is common."""
    try:
        import docker

        return bool(docker.from_env(timeout=3).ping())
    except Exception:  # noqa: BLE001  the client's own errors, those of its HTTP library, and no client at all
        return False


def run_kafka(image: str, properties: str, port: int) -> Any:
    """Run a broker whose port 9092 is `port` here; its configuration is that of a broker of our own."""
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(image).with_bind_ports(9092, port)
    for line in properties.splitlines():
        name, _, value = line.partition("=")
        container = container.with_env("KAFKA_" + name.upper().replace(".", "_"), value)
    return container.start()


def run_postgres(image: str) -> tuple[Any, str]:
    """Run a PostgreSQL; gives its container and its URL without a database."""
    from testcontainers.postgres import PostgresContainer

    container = PostgresContainer(image, username="clarion", password="clarion", dbname="postgres", driver=None).start()
    return container, str(container.get_connection_url()).rsplit("/", 1)[0]
