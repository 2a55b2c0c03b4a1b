"""A YAML document as plain values that still knows where each key was written, and collects faults by place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import yaml

from clarion.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Keys = tuple[str | int, ...]

MAX_FILE_BYTES = 2**20
MAX_DEPTH = 40


def dotted(keys: Keys) -> str:
    """Write a key's path as people do: `gateway.sources[0].host`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


class Located:
    """A document's value, the (line, column) of every key, and the faults noted: (place, what).

    Safe YAML only: no tags beyond the plain ones, no aliases (they multiply), no key twice.
    """

    def __init__(self, name: str, raw: bytes) -> None:
        self.name = name
        self.marks: dict[Keys, tuple[int, int]] = {}
        self.faults: list[tuple[str, str]] = []
        self.value = self._read(raw)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Read a file. Raises ConfigError when it cannot be read."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
        return cls(str(path), raw)

    def place(self, keys: Keys, *, column: bool = False) -> str:
        """Say where a key is: `file:line` or `file:line:column`; that of the nearest key around one that is absent."""
        while keys and keys not in self.marks:
            keys = keys[:-1]
        line, position = self.marks.get(keys, (1, 1))
        return f"{self.name}:{line}:{position}" if column else f"{self.name}:{line}"

    def fault(self, keys: Keys, what: str) -> None:
        """Note a fault at a key."""
        self.faults.append((self.place(keys), f"{dotted(keys)}: {what}" if keys else what))

    def _read(self, raw: bytes) -> Any:  # noqa: ANN401  whatever the document holds
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError([f"{self.name}: has more than {MAX_FILE_BYTES} bytes"])
        try:
            text = raw.decode("utf-8")
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    line = event.start_mark.line + 1 if event.start_mark else 1
                    raise ConfigError([f"{self.name}:{line}: aliases (*{event.anchor}) are not allowed; write it out"])
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise ConfigError([f"{self.name}: is not UTF-8 text"]) from error
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError([f"{self.name}:{line}: is not YAML: {error.problem}"]) from error
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError([f"{self.name}: is not YAML: {type(error).__name__}"]) from error
        return {} if node is None else self._value(node, ())

    def _value(self, node: yaml.Node, keys: Keys) -> Any:  # noqa: ANN401  whatever the node holds
        self.marks.setdefault(keys, (node.start_mark.line + 1, node.start_mark.column + 1))
        if len(keys) > MAX_DEPTH:
            self.fault(keys, f"is nested deeper than {MAX_DEPTH} levels")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*keys, index)) for index, child in enumerate(node.value)]
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError):
            self.fault(keys, f"cannot be read as {node.tag.rsplit(':', 1)[-1]}; put it in quotes if it is text")
            return None

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            self.marks[(*keys, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if key in found:
                self.fault((*keys, key), "is written twice; remove one")
            found[key] = self._value(value_node, (*keys, key))
        return found
