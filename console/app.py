"""Wiring: a checked configuration and a stage's name -> the stage, ready to be stepped. Nothing happens at import."""

from __future__ import annotations

import fcntl
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from clarion.adapters.clock import SystemClock
from clarion.adapters.database import Database
from clarion.adapters.files import make_folder
from clarion.adapters.objects import FileStore
from clarion.errors import ResourceBusyError
from clarion.service import open_wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from io import TextIOWrapper
    from pathlib import Path

    from clarion.adapters.wakeup import Wakeup
    from clarion.plugins import Executor
    from clarion.ports import Clock, EventBus
    from clarion.service import Stage
    from console.checks import Checked
    from gateway.delivery import DeliveryStage
    from gateway.grouping import Grouping
    from orchestrator.engine import Engine
    from streams.match import ResolvedPipeline
    from streams.replay import EventHistory
    from streams.stage import StreamsStage

_LOOK_AT_LOCK_S = 0.1


def lock(data: Path, name: str, wait_s: float = 0.0) -> TextIOWrapper:
    """Take a lock that ends with this process. Raises ResourceBusyError when another has it after `wait_s`."""
    make_folder(data)
    file = (data / f"{name}.lock").open("w")
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(_LOOK_AT_LOCK_S)
                continue
            file.close()
            raise ResourceBusyError(
                f"another Clarion ({name}) already runs on {data}; stop it, or give this one a `data` folder of its own"
            ) from error
        return file


@dataclass
class App:
    """What the stages of one process share; each part is made when it is first used."""

    checked: Checked
    wakeup: Wakeup
    clock: Clock

    @cached_property
    def data(self) -> Path:
        """The data folder."""
        return make_folder(self.checked.config.data)

    @cached_property
    def store(self) -> FileStore:
        """The object store."""
        return FileStore(self.data / "objects")

    @cached_property
    def database(self) -> Database:
        """The database."""
        make_folder(self.data)
        return Database(self.checked.config.database_url, on_commit=self.wakeup.ring)

    def bus(self, *, streams: bool = False) -> EventBus:
        """A bus for one stage's subscriptions: handlers cannot tell which. That of the streams may run on Faust."""
        from clarion.adapters.embedded import EmbeddedBus  # noqa: PLC0415  each process imports only what it runs

        if self.checked.config.bus.kind == "embedded":
            return EmbeddedBus(self.database, self.clock)
        from clarion.adapters.kafka_bus import KafkaBus  # noqa: PLC0415  an extra
        from console.topics import kafka_of  # noqa: PLC0415  as above

        kafka = kafka_of(self.checked.config)
        return KafkaBus(self.database, self.clock, kafka, runtime=kafka.streams_runtime if streams else "kafka-python")

    def relay(self) -> Stage:
        """The relay from the outbox to Kafka."""
        from clarion.adapters.relay import Relay  # noqa: PLC0415  an extra
        from console.topics import kafka_of  # noqa: PLC0415  as above

        return Relay(self.database, kafka_of(self.checked.config))

    def intake(self) -> Stage:
        """Receiving: depends on the local disk alone."""
        from console.intake import IntakeStage  # noqa: PLC0415  each process imports only what it runs

        return IntakeStage(self.checked.config.gateway, self.data, self.clock)

    def stow(self) -> Stage:
        """Receiving by STOW-RS."""
        from console.stow_stage import StowStage  # noqa: PLC0415  each process imports only what it runs

        return StowStage(self.checked.config.gateway, self.data, self.clock)

    def grouping(self) -> Grouping:
        """The grouping owner."""
        from gateway.doorbell import Doorbell  # noqa: PLC0415  as above
        from gateway.grouping import Grouping  # noqa: PLC0415  as above
        from gateway.registry import load_registry  # noqa: PLC0415  as above
        from gateway.retention import policy_of  # noqa: PLC0415  as above

        self.bus()
        return Grouping(
            journal_folder=make_folder(self.data / "journal"),
            # It wakes the others itself: not after every transaction.
            database=Database(self.checked.config.database_url),
            store=self.store,
            clock=self.clock,
            registry=load_registry(self.checked.config.gateway),
            policy=policy_of(self.checked.config.gateway),
            doorbell=Doorbell(self.data / "journal", self.data / "wake"),
            wake=self.wakeup.ring,
        )

    def streams(self) -> StreamsStage:
        """The stream handlers."""
        from streams.stage import StreamsStage  # noqa: PLC0415  as above

        return StreamsStage(
            bus=self.bus(streams=True),
            database=self.database,
            clock=self.clock,
            pipelines=self.pipelines(),
            history=self.history(),
        )

    def pipelines(self) -> tuple[ResolvedPipeline, ...]:
        """The pipelines as configured now, each definition kept as an object."""
        from streams.stage import resolve  # noqa: PLC0415  as above

        configured = self.checked.config.pipelines
        described = [(one.id, self.checked.definitions[one.id], one.destinations) for one in configured]
        return resolve(described, self.store)

    def history(self) -> EventHistory:
        """What was said before: the topics, or the table of events."""
        from clarion.adapters.history import OutboxHistory  # noqa: PLC0415  as above

        if self.checked.config.bus.kind == "embedded":
            return OutboxHistory(self.database)
        from clarion.adapters.kafka_history import KafkaHistory  # noqa: PLC0415  an extra
        from console.topics import kafka_of  # noqa: PLC0415  as above

        return KafkaHistory(kafka_of(self.checked.config))

    def orchestrator(self, executor: Executor | None = None) -> Engine:
        """The orchestrator, with the local executor unless given another."""
        from clarion.events import JobRequested, ReplayOrdered  # noqa: PLC0415  as above
        from clarion.loading import build  # noqa: PLC0415  as above
        from orchestrator.engine import Engine  # noqa: PLC0415  as above
        from orchestrator.ledger import Ledger  # noqa: PLC0415  as above
        from orchestrator.requests import JobRequests, JobRetries  # noqa: PLC0415  as above

        ledger = Ledger(self.database, self.clock)
        bus = self.bus()
        bus.subscribe("ledger", [JobRequested], JobRequests(self.database))
        bus.subscribe("ledger-replays", [ReplayOrdered], JobRetries(self.database))
        return Engine(
            config=self.checked.config.orchestrator,
            bus=bus,
            ledger=ledger,
            executor=executor or build("clarion.executors", "local", {}),
            store=self.store,
            work=self.data / "work",
            clock=self.clock,
        )

    def delivery(self) -> DeliveryStage:
        """Delivering results."""
        from clarion.events import DeliveryRequested, JobSuperseded, ReplayOrdered  # noqa: PLC0415  as above
        from gateway import tables  # noqa: PLC0415  as above
        from gateway.answers import CommitmentAnswers  # noqa: PLC0415  as above
        from gateway.delivery import DeliveryStage  # noqa: PLC0415  as above
        from gateway.jobs import GroupJobs  # noqa: PLC0415  as above
        from gateway.outages import Outages  # noqa: PLC0415  as above
        from gateway.outbound import Outbound  # noqa: PLC0415  as above
        from gateway.requests import (  # noqa: PLC0415  as above
            DeliveryRequests,
            ReplayedDeliveries,
            SupersededJobs,
        )

        bus = self.bus()
        self.database.create(tables.SCHEMA)
        bus.subscribe("delivery", [DeliveryRequested], DeliveryRequests(self.database, self.store))
        bus.subscribe("delivery-superseded", [JobSuperseded], SupersededJobs(self.database))
        bus.subscribe("retention", GroupJobs.kinds, GroupJobs(self.database))
        bus.subscribe("delivery-replays", [ReplayOrdered], ReplayedDeliveries(self.database, self.store))
        return DeliveryStage(
            config=self.checked.config.gateway,
            bus=bus,
            outbound=Outbound(self.database),
            outages=Outages(self.database),
            store=self.store,
            clock=self.clock,
            answers=CommitmentAnswers(self.database, self.checked.config.gateway, self.clock),
        )

    def console(self) -> Stage:
        """The web page."""
        from console.pages.stage import ConsoleStage  # noqa: PLC0415  as above

        return ConsoleStage(self.checked, self.database, self.store)

    def stage(self, name: str) -> Stage:
        """Make a stage by its name."""
        makers: Mapping[str, Callable[[], Stage]] = {
            "intake": self.intake,
            "stow": self.stow,
            "grouping": self.grouping,
            "streams": self.streams,
            "orchestrator": self.orchestrator,
            "delivery": self.delivery,
            "relay": self.relay,
            "console": self.console,
        }
        return makers[name]()


def build_app(checked: Checked, name: str) -> App:
    """Make the parts of a process."""
    data = make_folder(checked.config.data)
    return App(checked=checked, wakeup=open_wakeup(data, name), clock=SystemClock())
