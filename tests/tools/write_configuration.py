"""Write the tables of docs/configuration.md anew: every key, its default and what it may be, from the models.

What stands in the last column is kept; a key that is new gets an empty one, which a test refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clarion.config import Config
from rules.by_tag import ByTag

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = "| key | default | may be | what |\n|---|---|---|---|\n"
_ROW = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", re.MULTILINE)
# What of the file stands under which heading; the first that fits.
SECTIONS = (
    ("Receiving associations", "gateway.scp"), ("Receiving by STOW-RS", "gateway.stow"),
    ("Called AE titles", "gateway.ae_titles"), ("Who may send", "gateway.sources"),
    ("Room on the disk, and for how long", "gateway.intake"), ("Quarantine", "gateway.quarantine"),
    ("Destinations", "gateway.destinations"),
    ("Delivering", "gateway.scu"), ("Delivering", "gateway.delivery"),
    ("Pipelines", "pipelines"), ("Jobs", "orchestrator"), ("The web page", "console"), ("Events", "bus"),
    ("Files, database, log", ""),
)  # fmt: skip
RULE = "The rule `by-tag`"


def keys_of(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Give key, default and what it may be of every leaf of a JSON schema."""
    for name, field in node["properties"].items():
        path = f"{prefix}{name}"
        required = name in node.get("required", ())
        inner, many = _model(schema, field)
        if inner is not None:
            yield from keys_of(schema, inner, f"{path}[]." if many else f"{path}.")
        else:
            yield path, "required" if required else _shown(field.get("default")), _allowed(schema, field)


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return dict(schema["$defs"][node["$ref"].rpartition("/")[2]]) if "$ref" in node else node


def _model(schema: dict[str, Any], field: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """Give the model that a field holds, if it does, and whether it holds several."""
    for one in (field, *field.get("anyOf", ())):
        found = _resolved(schema, one)
        if "properties" in found:
            return found, False
        if found.get("type") == "array" and "properties" in (inner := _resolved(schema, found.get("items", {}))):
            return inner, True
    return None, False


def _shown(default: object) -> str:
    if default is None or default in ([], {}, ()):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, list | tuple):
        return "`" + ", ".join(map(str, default)) + "`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _allowed(schema: dict[str, Any], field: dict[str, Any]) -> str:
    parts = [_resolved(schema, one) for one in field.get("anyOf", (field,)) if one.get("type") != "null"]
    return " or ".join(dict.fromkeys(_kind(schema, one) for one in parts))


def _kind(schema: dict[str, Any], one: dict[str, Any]) -> str:
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    match one.get("type"):
        case "array":
            return "list of " + _kind(schema, _resolved(schema, one["items"]))
        case "integer" | "number" as kind:
            return _numbers(kind, one)
        case "boolean":
            return "true, false"
        case "object":
            return "mapping"
    short = one.get("minLength", 0)
    return str(one.get("format", "text")) + (f" of {short} or more" if short > 1 else "")


def _numbers(kind: str, one: dict[str, Any]) -> str:
    low = one.get("minimum", one.get("exclusiveMinimum"))
    above = "above " if "exclusiveMinimum" in one else ""
    high = one.get("maximum")
    if low is None:
        return kind
    if high is None:
        return f"above {low:g}" if above else f"{low:g} or more"
    return f"{above}{low:g} to {high:g}"


def tables() -> dict[str, list[tuple[str, str, str]]]:
    """Give the rows of each heading."""
    schema = Config.model_json_schema()
    found: dict[str, list[tuple[str, str, str]]] = {title: [] for title, _ in SECTIONS}
    for row in keys_of(schema, schema):
        found[next(title for title, prefix in SECTIONS if row[0].startswith(prefix))].append(row)
    rule = ByTag.Config.model_json_schema()
    found[RULE] = list(keys_of(rule, rule))
    return found


def written(text: str) -> str:
    """Give the page with its tables made anew."""
    said = dict(_ROW.findall(text))
    for title, rows in tables().items():
        table = HEAD + "".join(f"| `{key}` | {default} | {may} | {said.get(key, '')} |\n" for key, default, may in rows)
        begin = text.index(f"## {title}\n")
        at = text.index("| key |", begin)
        end = next((one.start() for one in re.finditer(r"^(?!\|)", text[at:], re.MULTILINE)), len(text) - at)
        text = text[:at] + table + text[at + end :]
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
