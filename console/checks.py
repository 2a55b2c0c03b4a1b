"""Load the configuration and check what needs plug-ins and files: everything before anything starts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.adapters.files import refuse_network_file_system
from clarion.config import load_config
from clarion.definitions import read_definition
from clarion.errors import ConfigError, InvalidPipelineError
from clarion.loading import check_package_names
from gateway.access import matches
from gateway.journal import refuse_other_formats
from gateway.registry import load_registry
from gateway.wire.secure import acceptor_context, requestor_context
from orchestrator.pipelines import read_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clarion.config import Config
    from clarion.located import Keys, Located
    from clarion.model import TlsFiles

LOOPBACK = ("127.0.0.0/8", "::1/128")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration that was found good, with the text of its pipelines."""

    path: Path
    config: Config
    definitions: dict[str, bytes]


def check_config(path: Path, *, certificates: bool = True) -> Checked:
    """Load and check everything. Raises ConfigError with every fault.

    Who only looks needs no `certificates`: a gateway goes on with those it has while others are written.
    """
    check_package_names()
    config, located = load_config(path)
    definitions = _check_pipelines(config, located, path.parent)
    _check_rules(config, located)
    _check_console(config, located)
    if certificates:
        _check_tls(config, located)
        _check_stow(config, located)
    _check_database(config, located)
    if config.bus.kind == "kafka" and importlib.util.find_spec("kafka") is None:
        located.fault(("bus", "kind"), "kafka needs the extra: pip install 'clarion-gateway[kafka]'")
    _check_data(config, located)
    if located.faults:
        raise ConfigError([f"{place}: {what}" for place, what in located.faults])
    refuse_network_file_system(config.data)
    refuse_other_formats(config.data / "journal")
    return Checked(path=path, config=config, definitions=definitions)


def _check_pipelines(config: Config, located: Located, beside: Path) -> dict[str, bytes]:
    definitions: dict[str, bytes] = {}
    for index, pipeline in enumerate(config.pipelines):
        keys = ("pipelines", index, "file")
        try:
            raw = read_definition(pipeline.file, beside)
            read_pipeline(pipeline.file, raw)
            definitions[pipeline.id] = raw
        except (ConfigError, InvalidPipelineError) as error:
            for fault in error.faults:
                located.fault(keys, fault)
    return definitions


def _check_rules(config: Config, located: Located) -> None:
    def fault(index: int, what: str) -> None:
        keys = ("gateway", "ae_titles", index, "settings")
        setting, _, said = what.partition(": ")
        known = said and setting in config.gateway.ae_titles[index].settings
        located.fault((*keys, setting) if known else keys, said if known else what)

    load_registry(config.gateway, fault)
    known = {pipeline.id for pipeline in config.pipelines}
    for index, called in enumerate(config.gateway.ae_titles):
        for key, value in called.settings.items():
            if key.lower().startswith("pipeline-") and value not in known:
                keys = ("gateway", "ae_titles", index, "settings", key)
                located.fault(keys, f"no pipeline {value!r}; pipelines has: {', '.join(sorted(known)) or 'none'}")


def _check_data(config: Config, located: Located) -> None:
    above = next(one for one in (config.data, *config.data.parents) if one.exists())
    if not above.is_dir():
        located.fault(("data",), f"{above} is a file; name a folder, or one that can be made")


def notes_on(config: Config) -> list[str]:
    """Say what is allowed and is hardly meant: that nothing can be received."""
    gateway, notes = config.gateway, []
    if not gateway.ae_titles:
        notes.append("gateway.ae_titles is empty: every association is rejected (called-ae)")
    if not gateway.sources and gateway.scp.reject_unknown_sources:
        notes.append("gateway.sources is empty: nobody may send (calling-ae)")
    return notes


def _check_console(config: Config, located: Located) -> None:
    if not is_loopback(config.console.host) and config.console.token is None:
        located.fault(("console", "host"), f"{config.console.host} is not loopback; set console.token as well")
    scp = config.gateway.scp
    if not is_loopback(scp.host) and not scp.reject_unknown_sources and not scp.allow_anybody:
        located.fault(
            ("gateway", "scp", "reject_unknown_sources"),
            f"{scp.host} is not loopback, and without a list anybody there could send, in the clear; list who may in "
            "gateway.sources, or set gateway.scp.allow_anybody: true",
        )
    ports = [scp.port, config.console.port]
    if ports[0] == ports[1]:
        located.fault(("console", "port"), f"{ports[1]} is gateway.scp.port as well; choose another")


def _check_tls(config: Config, located: Located) -> None:
    """Read the PEM files as they will be read, and see that no ports are the same."""
    scp = config.gateway.scp
    if scp.tls is not None:
        keys = ("gateway", "scp", "tls")
        _try_tls(located, keys, acceptor_context, scp.tls.files)
        if scp.tls.port in {scp.port, config.console.port}:
            located.fault((*keys, "port"), f"{scp.tls.port} is used already; choose another")
        vouched = scp.reject_unknown_sources or scp.tls.client_ca is not None or scp.allow_anybody
        if not is_loopback(scp.tls.host) and not vouched:
            located.fault(
                (*keys, "client_ca"),
                f"{scp.tls.host} is not loopback, and without a list or client certificates anybody there could "
                "send; list who may in gateway.sources, set client_ca, or set gateway.scp.allow_anybody: true",
            )
    for index, one in enumerate(config.gateway.destinations):
        if one.tls is not None:
            _try_tls(located, ("gateway", "destinations", index, "tls"), requestor_context, one.tls.files)


def _check_stow(config: Config, located: Located) -> None:
    scp, stow = config.gateway.scp, config.gateway.stow
    if stow is None:
        return
    keys = ("gateway", "stow")
    if stow.tls is not None:
        _try_tls(located, (*keys, "tls"), acceptor_context, stow.tls.files)
    elif not is_loopback(stow.host):
        located.fault((*keys, "host"), f"{stow.host} is not loopback, and tokens would be in the clear; set tls")
    tokens = [one.token.get_secret_value() for one in stow.clients]
    for index, token in enumerate(tokens):
        if token in tokens[:index]:
            located.fault((*keys, "clients", index, "token"), "is used twice; each client needs its own")
    if stow.port in {scp.port, config.console.port, scp.tls.port if scp.tls is not None else 0}:
        located.fault((*keys, "port"), f"{stow.port} is used already; choose another")


def _try_tls(located: Located, keys: Keys, make: Callable[[TlsFiles], object], files: TlsFiles) -> None:
    try:
        make(files)
    except ConfigError as error:
        for fault in error.faults:
            located.fault(keys, fault)


def _check_database(config: Config, located: Located) -> None:
    url = config.database_url
    if url.startswith("postgresql://"):
        if importlib.util.find_spec("psycopg") is None:
            located.fault(("database", "url"), "postgresql needs the extra: pip install 'clarion-gateway[postgres]'")
    elif not url.startswith("sqlite:///"):
        located.fault(("database", "url"), "is postgresql://USER:PASSWORD@HOST:PORT/NAME, or left out for SQLite")


def is_loopback(host: str) -> bool:
    """Tell whether a host to listen on can be reached from this machine only."""
    try:
        return host == "localhost" or matches(",".join(LOOPBACK), host)
    except ValueError:
        return False
