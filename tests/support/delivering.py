"""A delivery stage with a database of its own, and a PACS of pynetdicom that answers as a test wants it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydicom import Dataset, dcmwrite
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]  # made from a table at import
    CTImageStorage,
    StudyRootQueryRetrieveInformationModelFind,
)
from support.postgres import url_in
from support.world import free_port, pause

from clarion.adapters.database import Database
from clarion.adapters.embedded import EmbeddedBus
from clarion.adapters.memory import ManualClock, MemoryStore
from clarion.adapters.outbox import events_table
from clarion.config import GatewayConfig
from clarion.events import DeliveryRequested, JobSuperseded
from clarion.model import JobId, ObjectRef, ResultInstance, ResultSet, SeriesUid, SopInstanceUid, StudyUid
from clarion.ports import ObjectStore
from clarion.testing.suites import MOMENT
from gateway import tables
from gateway.answers import CommitmentAnswers
from gateway.delivery import DeliveryStage
from gateway.outages import Outages
from gateway.outbound import Outbound
from gateway.requests import DeliveryRequests, SupersededJobs

EXPLICIT = str(ExplicitVRLittleEndian)
INSTANCES = 4


def data_set(number: int) -> Dataset:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientName = "1.2", "1.2.3", "Test^Delivery"
    ds.Rows = ds.Columns = 2
    ds.BitsAllocated = 16
    ds.PixelData = bytes(range(8))
    ds["PixelData"].VR = "OW"
    return ds


def encoded(ds: Dataset) -> bytes:
    out = io.BytesIO()
    ds.file_meta = Dataset()
    dcmwrite(out, ds, implicit_vr=False, little_endian=True, enforce_file_format=False)
    return out.getvalue()


class Rig:
    """`destination` overrides parts of the destination `pacs`, or is the list of all that there are."""

    def __init__(
        self, root: Path, port: int, *, destination: dict[str, Any] | list[dict[str, Any]] | None = None,
        scu: dict[str, Any] | None = None, store: ObjectStore | None = None, **delivery: float,
    ) -> None:  # fmt: skip
        self.clock = ManualClock(MOMENT)
        self.store: ObjectStore = store or MemoryStore()
        self.database = Database(url_in(root))
        self.database.create(tables.SCHEMA)
        bus = EmbeddedBus(self.database, self.clock)
        bus.subscribe("delivery", [DeliveryRequested], DeliveryRequests(self.database, self.store))
        bus.subscribe("delivery-superseded", [JobSuperseded], SupersededJobs(self.database))
        pacs = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": port}
        destinations = destination if isinstance(destination, list) else [{**pacs, **(destination or {})}]
        config = GatewayConfig.model_validate({
            "destinations": destinations,
            "scu": scu or {},
            "delivery": {
                "max_retries": 2, "connect_timeout_s": 3, "dimse_timeout_s": 3, "failure_threshold": 1, **delivery,
            },
        })  # fmt: skip
        self.outbound = Outbound(self.database)
        self.stage = DeliveryStage(
            config=config,
            bus=bus,
            outbound=self.outbound,
            outages=Outages(self.database),
            store=self.store,
            clock=self.clock,
            answers=CommitmentAnswers(self.database, config, self.clock),
        )
        self.bus = bus

    def request(
        self,
        *,
        missing: int | None = None,
        count: int = INSTANCES,
        to: str = "pacs",
        delivery: str = "d",
        pixels: bytes = b"",
        classes: Sequence[str] = (CTImageStorage,),
    ) -> None:
        instances = []
        for number in range(count):
            ds = data_set(number)
            ds.SOPClassUID = classes[number % len(classes)]
            if pixels:
                ds.PixelData = pixels
            data = encoded(ds)
            ref = self.store.put(data)
            if number == missing:
                ref = ObjectRef(location="memory:0", digest=hashlib.sha256(b"gone").hexdigest(), size_bytes=4)
            instances.append(ResultInstance(
                output="o", modality="CT", study_uid=StudyUid("1.2"), series_uid=SeriesUid("1.2.3"),
                sop_instance_uid=SopInstanceUid(f"1.2.3.{number}"), sop_class_uid=classes[number % len(classes)],
                transfer_syntax_uid=EXPLICIT, object=ref,
            ))  # fmt: skip
        result_set = self.store.put(ResultSet(job_id=JobId("j"), instances=tuple(instances)).encode())
        event = DeliveryRequested(
            subject=delivery, sequence=1, time=MOMENT, source="t", job_id="j", destination=to,
            result_set=result_set, instances=count,
        )  # fmt: skip
        self.bus.publish([event])

    def settle(self) -> Any:
        ends = {"verified", "unverified", "failed", "superseded"}
        for _ in range(2000):
            self.stage.step()
            if self.stage.idle():
                if self.row() is not None and self.row().state in ends:
                    return self.row()
                self.clock.advance(timedelta(seconds=2))
            pause(0.005)
        raise AssertionError(f"never settled: {self.row()}")

    def kinds(self) -> list[str]:
        with self.database.reading() as connection:
            query = sa.select(events_table.c.kind).where(events_table.c.subject == "d")
            return list(connection.execute(query.order_by(events_table.c.position)).scalars())

    def row(self, delivery: str = "d") -> Any:
        query = sa.select(tables.deliveries).where(tables.deliveries.c.delivery_id == delivery)
        with self.database.reading() as connection:
            return connection.execute(query).one_or_none()

    def step_until(self, condition: Callable[[], bool]) -> None:
        """Step, with the clock standing, until something is so."""
        for _ in range(2000):
            self.stage.step()
            if condition():
                return
            pause(0.005)
        raise AssertionError("it never was so")


@dataclass
class Peer:
    """`associations`: how many were accepted, in all and at most at once."""

    port: int
    stored: dict[str, int]
    associations: list[int] = field(default_factory=lambda: [0, 0, 0])
    on_association: Callable[[Any], object] = lambda _: None


@contextmanager
def peer(
    store: Callable[[str, int], int] = lambda *_: 0,
    find: Callable[[str], int] = lambda _: 0xFF00,
    *,
    classes: Iterable[str] = (CTImageStorage,),
    syntaxes: tuple[str, ...] = (EXPLICIT,),
    most: int = 10,
    port: int | None = None,
) -> Iterator[Peer]:
    """A PACS without storage commitment: `store` gives the status of the n-th arrival, `find` 0xFF00 or an error."""
    stored: dict[str, int] = {}

    def on_store(event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        stored[uid] = stored.get(uid, 0) + 1
        return store(uid, stored[uid])

    def on_find(_: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        for uid in list(stored):
            status = find(uid)
            if status != 0xFF00:
                yield status, None
                return
            answer = Dataset()
            answer.SOPInstanceUID = uid
            yield 0xFF00, answer

    seen = Peer(port or free_port(), stored)

    def on_accepted(event: evt.Event) -> None:
        seen.on_association(event.assoc)
        seen.associations[0] += 1
        seen.associations[2] += 1
        seen.associations[1] = max(seen.associations[1], seen.associations[2])

    def on_ended(_: evt.Event) -> None:
        seen.associations[2] -= 1

    ae = AE(ae_title="PACS")
    ae.maximum_associations = most
    for one in classes:
        ae.add_supported_context(one, syntaxes)
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    handlers = [
        (evt.EVT_C_STORE, on_store), (evt.EVT_C_FIND, on_find), (evt.EVT_ACCEPTED, on_accepted),
        (evt.EVT_RELEASED, on_ended), (evt.EVT_ABORTED, on_ended), (evt.EVT_CONN_CLOSE, lambda _: None),
    ]  # fmt: skip
    server = ae.start_server(("127.0.0.1", seen.port), block=False, evt_handlers=handlers)  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        assert server is not None
        server.shutdown()


@contextmanager
def dripping(after: bytes) -> Iterator[int]:
    """Say `after` to whoever connects, then a byte now and then, for ever; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(after)
                while not ended.wait(0.05):
                    connection.sendall(b"\0")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        listener.close()
        thread.join(10)
