"""Entry points -> plug-ins, and the check that our package names are ours alone."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from clarion.errors import ClarionError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

DISTRIBUTION = "clarion-gateway"
PACKAGES = ("clarion", "gateway", "rules", "streams", "orchestrator", "operators", "writers", "console")


def check_package_names() -> None:
    """Refuse to run beside a distribution that provides one of our top-level packages."""
    providers = importlib.metadata.packages_distributions()
    foreign = {
        name: sorted(set(providers.get(name, [])) - {DISTRIBUTION})
        for name in PACKAGES
        if set(providers.get(name, [])) - {DISTRIBUTION}
    }
    if foreign:
        listed = "; ".join(f"package {name!r} also comes from {', '.join(others)}" for name, others in foreign.items())
        raise ClarionError(f"{listed}. Install {DISTRIBUTION} into an environment without it")


@functools.cache
def _points(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Look a group up once: every look-up reads the metadata of all that is installed."""
    return tuple(importlib.metadata.entry_points(group=group))


def names(group: str) -> list[str]:
    """List the plug-ins of an entry-point group."""
    return sorted({point.name for point in _points(group)})


def find(group: str, name: str) -> type[Any]:
    """Load the plug-in class of that name. Raises ConfigError when there is none, two, or it cannot be loaded."""
    points = [point for point in _points(group) if point.name == name]
    if not points:
        kind = group.rpartition(".")[2].removesuffix("s")
        raise ConfigError([f"no {kind} named {name!r}; there are: {', '.join(names(group)) or 'none'}"])
    if len({point.value for point in points}) > 1:
        given = " and ".join(f"{point.value} of {point.dist.name if point.dist else '?'}" for point in points)
        raise ConfigError([f"{group} {name!r} is provided twice, as {given}; uninstall or rename one"])
    try:
        found: type[Any] = points[0].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"{group} {name!r} ({points[0].value}) cannot be loaded: {error}"]) from error
    return found


def config_model(plugin: type[Any]) -> type[BaseModel] | None:
    """Give the plug-in's `Config`, if it has one."""
    model = getattr(plugin, "Config", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def build(group: str, name: str, settings: Mapping[str, Any]) -> Any:  # noqa: ANN401  the caller names the contract
    """Make the plug-in with its validated settings. Raises ConfigError naming the setting."""
    plugin = find(group, name)
    model = config_model(plugin)
    if model is None:
        if settings:
            raise ConfigError([f"{group} {name!r} takes no settings, but was given {', '.join(settings)}"])
        return plugin()
    try:
        return plugin(model.model_validate(dict(settings)))
    except ValidationError as error:
        known = [field.alias or key for key, field in model.model_fields.items()]
        said = [_said(fault["type"], fault["loc"], fault["msg"], known) for fault in error.errors()]
        raise ConfigError(said) from error


def _said(kind: str, place: tuple[int | str, ...], message: str, known: list[str]) -> str:
    """Say what is wrong with a setting: where, and what is meant perhaps."""
    where = ".".join(str(part) for part in place)
    message = message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(where, known, n=1, cutoff=0.5)
        message = f"unknown setting; did you mean {close[0]!r}?" if close else f"unknown setting; there are: {known}"
    return f"{where}: {message}" if where else message
