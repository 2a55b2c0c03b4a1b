"""Pipeline definitions as the configuration names them: a file, or one that comes with Clarion."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from clarion.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

BUILTIN = "builtin:"
MAX_DEFINITION_BYTES = 2**20


def bundled() -> list[str]:
    """List the pipelines that come with Clarion."""
    folder = resources.files("clarion") / "bundled"
    return sorted(one.name.removesuffix(".yaml") for one in folder.iterdir() if one.name.endswith(".yaml"))


def read_definition(file: str, beside: Path) -> bytes:
    """Read a definition; a relative path is beside the configuration file. Raises ConfigError."""
    if file.startswith(BUILTIN):
        name = file.removeprefix(BUILTIN)
        if name not in bundled():
            raise ConfigError([f"no bundled pipeline {name!r}; there are: {', '.join(bundled())}"])
        return (resources.files("clarion") / "bundled" / f"{name}.yaml").read_bytes()
    path = beside / file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error
    if len(data) > MAX_DEFINITION_BYTES:
        raise ConfigError([f"{path} has more than {MAX_DEFINITION_BYTES} bytes"])
    return data
