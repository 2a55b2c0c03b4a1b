"""`clarion doctor`: what could keep this installation from working, each with what to do about it."""

from __future__ import annotations

import socket
import sqlite3
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.adapters.database import Database
from clarion.adapters.files import free_bytes
from clarion.errors import ClarionError, PeerUnavailableError
from clarion.loading import check_package_names
from clarion.service import read_heartbeats
from console.checks import check_config, notes_on
from console.topics import kafka_of
from gateway.access import matches
from gateway.scu import Requestor, Timeouts
from gateway.space import Space
from gateway.web_peer import WebPeer
from gateway.wire.secure import expires

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from clarion.config import Config
    from clarion.model import Destination

_CONNECT_S = 3.0
_RENEW_BEFORE = timedelta(days=30)
# What a PostgreSQL has to be like for what it has committed to be there after a power cut.
_DURABLE: dict[str, set[str | None]] = {
    "fsync": {"on"},
    "full_page_writes": {"on"},
    "default_transaction_read_only": {"off"},
    "in_hot_standby": {"off", None},
    "server_encoding": {"UTF8"},
}
# An address of nobody's (RFC 5737): to match it every name has to be resolved.
_NOBODY = "192.0.2.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at; `remedy` says what to do when it is not good."""

    name: str
    good: bool
    found: str
    remedy: str = ""


def diagnose(config_file: Path) -> list[Check]:
    """Look at everything; never raises for what it finds."""
    checks = [_python(), _sqlite(), _names()]
    try:
        checked = check_config(config_file)
    except ClarionError as error:
        return [*checks, Check(name="configuration", good=False, found=str(error), remedy="mend the lines named")]
    config = checked.config
    checks.append(Check(name="configuration", good=True, found=str(config_file)))
    beats = [beat for beat in read_heartbeats(config.data / "run") if beat.alive]
    taken = {beat.stage: {beat.facts.get("port"), beat.facts.get("tls_port")} for beat in beats}
    notes = notes_on(config)
    checks.append(Check(name="receiving", good=not notes, found="; ".join(notes) or "sources and AE titles are named",
                        remedy="add them, unless you mean it"))  # fmt: skip
    checks += _names_of_sources(config)
    checks += _database(config)
    checks += _broker(config)
    checks.append(_space(config))
    checks += _ports(config, taken)
    checks += _certificates(config)
    checks += _peers(config)
    return checks


def _python() -> Check:
    version = ".".join(str(one) for one in sys.version_info[:3])
    return Check(name="python", good=sys.version_info >= (3, 11), found=version, remedy="use Python 3.11 or newer")


def _sqlite() -> Check:
    good = sqlite3.sqlite_version_info >= (3, 35)
    return Check(
        name="sqlite", good=good, found=sqlite3.sqlite_version, remedy="use a Python with SQLite 3.35 or newer"
    )


def _database(config: Config) -> Iterator[Check]:
    database = Database(config.database_url)
    if database.is_sqlite:
        return
    try:
        with database.reading() as connection:
            asked = ", ".join(f"current_setting('{name}', true) AS {name}" for name in _DURABLE)
            settings = connection.execute(sa.text(f"SELECT {asked}, version() AS version")).mappings().one()
    except ClarionError as error:
        yield Check(name="database", good=False, found=str(error),
                     remedy="start the server, or mend database.url; receiving goes on meanwhile")  # fmt: skip
    else:
        wrong = [f"{name} is {settings[name]}" for name, wanted in _DURABLE.items() if settings[name] not in wanted]
        found = " ".join(settings["version"].split()[:2])
        yield Check(name="database", good=not wrong, found=", ".join([f"{found} answers", *wrong]),
                    remedy="set them otherwise: such a server loses commits, or takes none")  # fmt: skip
    finally:
        database.close()


def _broker(config: Config) -> Iterator[Check]:
    if config.bus.kind != "kafka":
        return
    from clarion.adapters.kafka_topics import check_topics  # noqa: PLC0415  an extra

    try:
        differences = check_topics(kafka_of(config))
    except ClarionError as error:
        yield Check(name="broker", good=False, found=str(error),
                    remedy="start it, or mend bus.kafka; receiving and grouping go on meanwhile")  # fmt: skip
    else:
        found = "; ".join(differences) or "answers, topics as configured"
        yield Check(name="broker", good=not differences, found=found, remedy="run `clarion topics apply`")


def _names() -> Check:
    try:
        check_package_names()
    except ClarionError as error:
        return Check(name="packages", good=False, found=str(error), remedy="give Clarion an environment of its own")
    return Check(name="packages", good=True, found="our package names are ours alone")


def _space(config: Config) -> Check:
    folder = config.data if config.data.exists() else config.data.parent
    free, total = free_bytes(folder)
    return Check(
        name="disk",
        good=Space(folder, config.gateway.intake).available(),
        found=f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free under {folder}",
        remedy="free space (`clarion cleanup plan` says what is held), or lower gateway.intake.reserve_gb; "
        "senders are told to try later meanwhile",
    )


def _ports(config: Config, taken: dict[str, set[object]]) -> Iterator[Check]:
    """Look at every port; `taken` are those that a running Clarion of this folder says it has, by stage."""
    scp, stow, console = config.gateway.scp, config.gateway.stow, config.console
    ports = [
        ("gateway.scp.port", "intake", scp.host, scp.port),
        ("console.port", "console", console.host, console.port),
    ]
    if scp.tls is not None:
        ports.append(("gateway.scp.tls.port", "intake", scp.tls.host, scp.tls.port))
    if stow is not None:
        ports.append(("gateway.stow.port", "stow", stow.host, stow.port))
    for name, stage, host, port in ports:
        if port in taken.get(stage, set()):
            yield Check(name=name, good=True, found=f"{port}, in use by Clarion")
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                yield Check(
                    name=name,
                    good=False,
                    found=f"{port}: {error.strerror}",
                    remedy="stop what uses it, or choose another",
                )
            else:
                yield Check(name=name, good=True, found=f"{port} is free")


def _names_of_sources(config: Config) -> Iterator[Check]:
    for source in config.gateway.sources:
        try:
            matches(source.host, _NOBODY)
        except PeerUnavailableError as error:
            yield Check(name=f"source {source.ae_title}", good=False, found=str(error),
                        remedy="mend the name or DNS; until then its associations are rejected for now")  # fmt: skip


def _certificates(config: Config) -> Iterator[Check]:
    """Look at how long the certificates that we show are still valid."""
    gateway = config.gateway
    ours = [gateway.scp.tls, gateway.stow.tls if gateway.stow is not None else None]
    paths = [one.certificate for one in ours if one is not None]
    paths += [one.tls.certificate for one in gateway.destinations if one.tls is not None and one.tls.certificate]
    shown = set(paths)
    for certificate in sorted(shown):
        until = expires(certificate)
        if until is not None:
            soon = until - datetime.now(UTC) < _RENEW_BEFORE
            yield Check(name=f"certificate {certificate.name}", good=not soon, found=f"valid until {until:%Y-%m-%d}",
                        remedy="renew it: write certificate and key anew, no restart is needed")  # fmt: skip


def _web_peer(destination: Destination, timeouts: Timeouts) -> Check:
    try:
        with WebPeer(destination, timeouts) as peer:
            peer.look()
    except ClarionError as error:
        return Check(name=f"destination {destination.name}", good=False, found=str(error),
                     remedy="start the service, or mend dicomweb in gateway.destinations")  # fmt: skip
    return Check(name=f"destination {destination.name}", good=True, found="answers QIDO-RS")


def _peers(config: Config) -> Iterator[Check]:
    timeouts = Timeouts(connect_s=_CONNECT_S, dimse_s=_CONNECT_S)
    for one in config.gateway.destinations:
        if one.dicomweb is not None:
            yield _web_peer(one.destination, timeouts)
            continue
        try:
            with Requestor(
                one.destination,
                own_ae=config.gateway.scu.ae_title,
                timeouts=timeouts,
            ) as requestor:
                offers = [
                    name
                    for name, there in (("storage commitment", requestor.commits), ("query", requestor.finds))
                    if there
                ]
                status = requestor.echo()
        except ClarionError as error:
            yield Check(
                name=f"destination {one.name}",
                good=False,
                found=str(error),
                remedy=f"check host, port and AE titles, and that the peer knows {config.gateway.scu.ae_title}",
            )
            continue
        proof = ", ".join(offers) or "no way to verify; deliveries stay Sent"
        yield Check(name=f"destination {one.name}", good=status == 0, found=f"C-ECHO 0x{status:04X}; offers {proof}")
