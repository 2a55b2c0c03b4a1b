"""The reports of storage commitment that we owe (PS3.4 J.3.3): what is stored and what is not, on our own association.

A request is journalled by intake and judged by the grouping owner, in the order of the journal; here the result is told
to the peer that asked, with a budget of tries. Telling it twice does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog

from clarion.crashpoints import effect
from clarion.errors import PeerRefusedError, PeerUnavailableError
from gateway import tables
from gateway.outbound import backoff
from gateway.scu import Requestor, Timeouts

if TYPE_CHECKING:
    from clarion.adapters.database import Database
    from clarion.config import GatewayConfig
    from clarion.model import Destination
    from clarion.ports import Clock

log = structlog.get_logger()

WAITING, TOLD, UNTOLD = "waiting", "told", "untold"
NO_SUCH_INSTANCE, CLASS_CONFLICT = 0x0112, 0x0119
"""Failure reasons (PS3.3 C.14.1.1)."""
_TRIES = 8

_table = tables.commitment_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A result that is to be told; `stored` are (class, instance), `failed` (class, instance, reason)."""

    transaction_uid: str
    peer: str
    attempts: int
    stored: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str, int], ...]


def judge(connection: sa.Connection, fields: dict[str, Any], now: datetime) -> dict[str, Any]:
    """Judge a request by what is stored; gives the row to keep. Within the owner's transaction."""
    wanted = [(sop_class, instance) for sop_class, instance in fields["instances"]]
    uids = sorted({instance for _, instance in wanted})
    known: dict[str, str] = {}
    for first in range(0, len(uids), 500):
        table = tables.instances
        query = sa.select(table.c.sop_instance_uid, table.c.sop_class_uid)
        found = connection.execute(query.where(table.c.sop_instance_uid.in_(uids[first : first + 500])))
        known |= {row.sop_instance_uid: row.sop_class_uid for row in found}
    stored = [one for one in wanted if known.get(one[1]) == one[0]]
    failed = [
        (*one, CLASS_CONFLICT if one[1] in known else NO_SUCH_INSTANCE) for one in wanted if known.get(one[1]) != one[0]
    ]
    return {
        "transaction_uid": fields["transaction_uid"],
        "peer": fields["peer"],
        "asked": now.isoformat(),
        "stored": stored,
        "failed": failed,
        "state": WAITING,
        "attempts": 0,
        "due": now.isoformat(),
        "reason": "",
    }


class CommitmentAnswers:
    """Tells what is due. Safe from several threads."""

    def __init__(self, database: Database, config: GatewayConfig, clock: Clock) -> None:
        self._database = database
        self._config = config
        self._clock = clock
        self._timeouts = Timeouts(connect_s=config.delivery.connect_timeout_s, dimse_s=config.delivery.dimse_timeout_s)

    def due(self, now: datetime) -> list[Answer]:
        """List what is to be told by now."""
        query = sa.select(_table).where(_table.c.state == WAITING, _table.c.due <= now.isoformat())
        with self._database.reading() as connection:
            return [_answer(row) for row in connection.execute(query.order_by(_table.c.asked).limit(100))]

    def tell(self, answer: Answer, destination: Destination | None) -> None:
        """Tell the peer, or note why it cannot be told."""
        if destination is None:
            self._settle(answer, UNTOLD, f"no destination has the AE title {answer.peer!r}, so it cannot be reached")
            return
        try:
            with Requestor(
                destination, own_ae=self._config.scu.ae_title, timeouts=self._timeouts, reports=True
            ) as requestor:
                status = requestor.report_commitment(answer.transaction_uid, answer.stored, answer.failed)
        except (PeerUnavailableError, PeerRefusedError) as error:
            self._failed(answer, str(error))
            return
        if status:
            self._failed(answer, f"answered 0x{status:04X}")
        else:
            log.info("commitment.told", peer=answer.peer, stored=len(answer.stored), failed=len(answer.failed))
            self._settle(answer, TOLD, "")

    def _failed(self, answer: Answer, reason: str) -> None:
        settings = self._config.delivery
        last = answer.attempts + 1 >= _TRIES
        pause = backoff(answer.attempts + 1, settings.retry_delay_s, settings.retry_delay_max_s)
        log.warning("commitment.nottold", peer=answer.peer, reason=reason, final=last)
        self._settle(answer, UNTOLD if last else WAITING, reason, pause)

    def _settle(self, answer: Answer, state: str, reason: str, pause: timedelta = timedelta(0)) -> None:
        here = sa.and_(_table.c.transaction_uid == answer.transaction_uid, _table.c.peer == answer.peer)
        values = {"state": state, "reason": reason, "attempts": answer.attempts + 1}
        due = (self._clock.now() + pause).isoformat()
        with effect("commitment.settle"), self._database.transaction() as connection:
            connection.execute(_table.update().where(here).values(**values, due=due))


def _answer(row: sa.Row[Any]) -> Answer:
    return Answer(
        transaction_uid=row.transaction_uid,
        peer=row.peer,
        attempts=row.attempts,
        stored=tuple((sop_class, instance) for sop_class, instance in row.stored),
        failed=tuple((sop_class, instance, reason) for sop_class, instance, reason in row.failed),
    )
