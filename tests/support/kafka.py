"""A real Apache Kafka in KRaft mode: that of CLARION_TEST_KAFKA, one of our own from cached jars, or a container."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata
from support import containers
from support.dcmtk import need
from support.world import free_port, pause

from clarion.adapters.kafka import client_settings
from clarion.adapters.kafka_topics import apply_topics
from clarion.config import KafkaConfig

VERSION = "4.1.1"
IMAGE = f"apache/kafka:{VERSION}"
LOG4J = "2.24.3"
CACHE = Path.home() / ".cache" / "clarion" / f"kafka-{VERSION}"
JAVA, MAVEN = Path(shutil.which("java") or "/usr/bin/java"), Path(shutil.which("mvn") or "/usr/bin/mvn")

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>clarion</groupId><artifactId>kafka-for-tests</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>{LOG4J}</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId><version>{LOG4J}</version></dependency>
  </dependencies>
</project>
"""
_LOG4J = """status=error
appender.console.type=Console
appender.console.name=out
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d %p %c{1} %m%n
rootLogger.level=warn
rootLogger.appenderRef.out.ref=out
"""
# One broker that is its own controller, small, and quick to notice members that come and go.
_PROPERTIES = """process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://{host}:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{advertised}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller}
log.dirs={folder}/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""


def source() -> str:
    """Say which broker serves, in words."""
    if given := os.environ.get("CLARION_TEST_KAFKA"):
        return f"{given} (CLARION_TEST_KAFKA)"
    if JAVA.exists() and (MAVEN.exists() or (CACHE / "complete").exists()):
        return f"Apache Kafka {VERSION}, of our own"
    return f"container {IMAGE}" if containers.engine() else "none: install default-jre-headless and maven"


def jars() -> Path:
    """Give the folder of Kafka's jars; fetched once, under a lock, into the user's cache."""
    folder = CACHE / "lib"
    if (CACHE / "complete").exists():
        return folder
    need(JAVA, "default-jre-headless")
    need(MAVEN, "maven")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "complete").exists():
            (CACHE / "pom.xml").write_text(_POM)
            command = [str(MAVEN), "-q", "-B", "dependency:copy-dependencies", "-DincludeScope=runtime"]
            subprocess.run(
                [*command, f"-DoutputDirectory={folder}"], cwd=CACHE, check=True, timeout=300, stdin=subprocess.DEVNULL
            )
            (CACHE / "complete").touch()
    return folder


@dataclass
class Broker:
    """A broker; `kill` ends it as the power does, `start` brings it back on the same port and folder."""

    address: str
    folder: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    container: Any = None

    def start(self) -> None:
        if self.folder is None:
            return
        memory = ["-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        logging = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.properties'}"
        command = [str(JAVA), *memory, logging, "-cp", f"{jars()}/*", "kafka.Kafka"]
        with (self.folder / "broker.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder / "server.properties")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.wait()

    def wait(self, deadline_s: float = 90) -> None:
        """Wait until it answers."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                admin = KafkaAdminClient(bootstrap_servers=self.address, bootstrap_timeout_ms=2000)
                admin.list_topics()
                admin.close()
            except KafkaError:
                assert time.monotonic() < end, self.log()
                assert self.process is None or self.process.poll() is None, self.log()
                pause(0.1)
            else:
                return

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        if self.container is not None:
            self.container.stop()

    def log(self) -> str:
        return (self.folder / "broker.log").read_text()[-3000:] if self.folder else ""


def start_broker(folder: Path, through: Callable[[int], int] | None = None) -> Broker:
    """Use the broker that the environment names, or start one of our own on loopback.

    `through` gives, for the broker's port, the one that clients are told to use: a proxy's.
    """
    given = os.environ.get("CLARION_TEST_KAFKA")
    if given:
        broker = Broker(given)
        broker.wait()
        return broker
    if source().startswith("container"):
        return _start_container()
    lib = jars()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    told = through(port) if through else port
    (folder / "log4j2.properties").write_text(_LOG4J)
    (folder / "server.properties").write_text(
        _PROPERTIES.format(host="127.0.0.1", port=port, controller=free_port(), folder=folder, advertised=told)
    )
    java = [str(JAVA), "-cp", f"{lib}/*", "kafka.tools.StorageTool"]
    # Any base64 UUID names a cluster; this one is for all that tests start.
    identity = "Y2xhcmlvbi10ZXN0cy0wMQ"
    properties = str(folder / "server.properties")
    subprocess.run([*java, "format", "-t", identity, "-c", properties], check=True, capture_output=True, timeout=60)
    broker = Broker(f"127.0.0.1:{told}", folder)
    broker.start()
    return broker


def topics_on(address: str, partitions: int = 3) -> KafkaConfig:
    """Make topics that nobody else has."""
    config = KafkaConfig(
        bootstrap=(address,), prefix=f"t{uuid.uuid4().hex[:12]}", partitions=partitions, replication=1,
        min_insync_replicas=1,
    )  # fmt: skip
    apply_topics(config)
    return config


def stand_at_end(config: KafkaConfig, group: str, topics: tuple[str, ...]) -> None:
    """Let a consumer group, which has no member yet, have read everything that its topics hold."""
    client = KafkaConsumer(**client_settings(config), group_id=group, enable_auto_commit=False)
    try:
        places = [TopicPartition(topic, one) for topic in topics for one in client.partitions_for_topic(topic) or ()]
        assert places
        client.assign(places)
        ends = client.end_offsets(places)
        client.commit({place: OffsetAndMetadata(end, "", -1) for place, end in ends.items()})
    finally:
        client.close()


def _start_container() -> Broker:
    port = free_port()
    properties = _PROPERTIES.format(host="0.0.0.0", port=9092, controller=9093, folder="/tmp/kafka", advertised=port)
    broker = Broker(f"127.0.0.1:{port}", container=containers.run_kafka(IMAGE, properties, port))
    broker.wait()
    return broker
