"""Read a pipeline definition: YAML -> Pipeline, or every fault at once as `file:line:column  PDLnnn  what → remedy`.

The grammar is that of the pipeline language 0.7.0 restricted to operators that run here: streams between operators,
`operator:` images. What the language has beyond that is refused by name, never passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clarion.errors import ConfigError, InvalidPipelineError
from clarion.loading import names
from clarion.located import Keys, Located, dotted

if TYPE_CHECKING:
    from collections.abc import Mapping

OPERATORS = "clarion.operators"
IN_PROCESS = "operator:"
VERSIONS = ("0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0")
MAX_OPERATORS = 1000
GATE = "result-gate"

_NAME = r"^[A-Za-z0-9_-]{1,255}$"
_LATER = ("import", "models", "services", "profiler", "parameters", "pull-secrets")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class _Input(_Part):
    name: Annotated[str, Field(pattern=_NAME)] | None = None
    from_: str | None = Field(default=None, alias="from", pattern=_NAME)
    path: str | None = None
    type: str | None = None
    element_type: Annotated[str | None, Field(alias="element-type")] = None


class _Output(_Part):
    name: Annotated[str, Field(pattern=_NAME)] | None = None
    path: str | None = None
    type: str | None = None
    element_type: Annotated[str | None, Field(alias="element-type")] = None


class _Container(_Part):
    image: str
    tag: str | None = None
    variables: dict[str, str | int | float | bool] = {}


class _Requests(_Part):
    cpu: Annotated[int, Field(ge=0)] = 1
    memory: Annotated[int, Field(ge=0)] = 512
    gpu: Annotated[int, Field(ge=0)] = 0


class _Operator(_Part):
    name: Annotated[str, Field(pattern=_NAME)]
    container: _Container
    input: tuple[_Input, ...] = ()
    output: tuple[_Output, ...] = ()
    requests: _Requests = _Requests()
    variables: dict[str, str | int | float | bool] = {}


class _Document(_Part):
    api_version: Annotated[str, Field(alias="api-version")]
    name: Annotated[str, Field(pattern=_NAME)]
    orchestrator: str = "Clarion"
    timeout: Annotated[int, Field(gt=0)] | None = None
    operators: Annotated[tuple[_Operator, ...], Field(min_length=1, max_length=MAX_OPERATORS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What an operator reads: an output of another operator, or the payload when `source` is None."""

    name: str
    source: str | None
    output: str
    element_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A folder that an operator fills."""

    name: str
    element_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorDefinition:
    """One operator of a pipeline; `plugin` is its entry point."""

    name: str
    plugin: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    cpu: int = 1

    @property
    def upstream(self) -> frozenset[str]:
        """The operators that must have completed before."""
        return frozenset(one.source for one in self.inputs if one.source is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A definition that was accepted; its operators stand in an order in which they can run."""

    name: str
    timeout_s: float | None
    operators: tuple[OperatorDefinition, ...]

    @property
    def results(self) -> tuple[tuple[str, str], ...]:
        """The (operator, output) pairs that are results: DICOM outputs of every operator but the gate."""
        return tuple(
            (operator.name, output.name)
            for operator in self.operators
            for output in operator.outputs
            if output.element_type == "dicom" and operator.name != GATE
        )


class _Reader:
    """Reads one definition and collects its faults."""

    def __init__(self, name: str, raw: bytes) -> None:
        self._faults: list[str] = []
        try:
            self._located = Located(name, raw)
        except ConfigError as error:
            raise InvalidPipelineError([f"{fault}  PDL001  → write safe YAML" for fault in error.faults]) from error
        for place, what in self._located.faults:
            self._faults.append(f"{place}:1  PDL001  {what}")

    def fault(self, keys: Keys, code: str, what: str, remedy: str) -> None:
        place = self._located.place(keys, column=True)
        self._faults.append(f"{place}  PDL{code}  {dotted(keys) or 'document'}: {what} → {remedy}")

    def check(self) -> None:
        if self._faults:
            raise InvalidPipelineError(self._faults)

    def read(self) -> Pipeline:
        value = _without_free_text(self._located.value)
        if not isinstance(value, dict):
            self.fault((), "001", "is not a mapping", "begin with api-version, name, operators")
            self.check()
        if value.get("api-version") not in VERSIONS:
            self.fault(("api-version",), "002", f"{value.get('api-version')!r}", f"write one of {', '.join(VERSIONS)}")
        try:
            document = _Document.model_validate(value)
        except ValidationError as error:
            places = [tuple(one["loc"]) for one in error.errors()]
            for one, keys in zip(error.errors(), places, strict=True):
                # A list whose items are at fault counts as too short; the items' own faults say what is wrong.
                inner = any(len(other) > len(keys) and other[: len(keys)] == keys for other in places)
                if not (one["type"] == "too_short" and inner):
                    self._model_fault(one["type"], keys, one["msg"])
            self.check()
            raise
        operators = [self._operator(index, one) for index, one in enumerate(document.operators)]
        self._check_names(operators)
        self._check_connections(operators)
        self.check()
        ordered = self._in_order(operators)
        self.check()
        return Pipeline(
            name=document.name,
            timeout_s=document.timeout,
            operators=(*ordered, _gate(ordered)),
        )

    def _model_fault(self, kind: str, keys: tuple[Any, ...], message: str) -> None:
        if kind == "extra_forbidden" and keys[-1] in _LATER:
            self.fault(keys, "003", "is not supported by this version of Clarion", "leave it out")
        elif kind == "extra_forbidden":
            self.fault(keys, "003", "unknown field", "remove it, or prefix it with x-")
        elif kind in {"missing", "too_short"}:
            self.fault(keys, "004", "is required", "add it")
        elif kind == "string_pattern_mismatch":
            self.fault(keys, "005", "is not a name", "use 1 to 255 of A-Z a-z 0-9 - _")
        else:
            self.fault(keys, "006", message, "write a value of that type")

    def _operator(self, index: int, one: _Operator) -> OperatorDefinition:
        keys: Keys = ("operators", index)
        image = one.container.image
        plugin = image.removeprefix(IN_PROCESS)
        if not image.startswith(IN_PROCESS):
            remedy = "name an operator of this installation as operator:NAME; containers need the kubernetes executor"
            self.fault((*keys, "container", "image"), "030", f"{image!r} is a container image", remedy)
        elif plugin not in names(OPERATORS):
            known = ", ".join(names(OPERATORS))
            self.fault((*keys, "container", "image"), "030", f"no operator {plugin!r}", f"installed are: {known}")
        inputs = tuple(
            Input(
                name=item.name or item.from_ or "payload",
                source=item.from_,
                output=item.name or "",
                element_type=self._stream((*keys, "input", place), item),
            )
            for place, item in enumerate(one.input)
        )
        outputs = tuple(
            Output(name=item.name or "output", element_type=self._stream((*keys, "output", place), item))
            for place, item in enumerate(one.output)
        )
        self._check_paths((*keys, "input"), [item.path for item in one.input])
        self._check_paths((*keys, "output"), [item.path for item in one.output])
        variables = {name: _as_text(value) for name, value in {**one.container.variables, **one.variables}.items()}
        return OperatorDefinition(
            name=one.name, plugin=plugin, inputs=inputs, outputs=outputs, variables=variables, cpu=one.requests.cpu
        )

    def _stream(self, keys: Keys, item: _Input | _Output) -> str:
        if item.type not in {None, "stream"}:
            self.fault((*keys, "type"), "015", f"type {item.type!r} needs shared memory", "use type: stream")
        if item.path is None:
            self.fault(keys, "004", "a stream needs a path", "add path: /FOLDER")
        if item.type == "stream" and item.element_type is None:
            self.fault(keys, "015", "a stream needs an element-type", "add element-type")
        return item.element_type or ""

    def _check_paths(self, keys: Keys, paths: list[str | None]) -> None:
        for index, path in enumerate(paths):
            if path is None:
                continue
            if not path.startswith("/") or ".." in path.split("/"):
                self.fault((*keys, index, "path"), "013", f"{path!r} is not a rooted path", "write /FOLDER")
            elif path in paths[:index]:
                self.fault((*keys, index, "path"), "013", f"{path!r} is used twice", "give each its own")

    def _check_names(self, operators: list[OperatorDefinition]) -> None:
        seen: set[str] = {GATE}
        for index, one in enumerate(operators):
            if one.name.lower() in seen:
                self.fault(("operators", index, "name"), "005", f"{one.name!r} is taken", "choose another name")
            seen.add(one.name.lower())

    def _check_connections(self, operators: list[OperatorDefinition]) -> None:
        by_name = {one.name.lower(): one for one in operators}
        for index, one in enumerate(operators):
            resolved = []
            for place, item in enumerate(one.inputs):
                keys: Keys = ("operators", index, "input", place)
                if item.source is None:
                    resolved.append(item)
                    continue
                source = by_name.get(item.source.lower())
                if source is None:
                    self.fault((*keys, "from"), "010", f"no operator {item.source!r}", f"write one of {list(by_name)}")
                    continue
                resolved.append(self._connect(keys, item, source))
            operators[index] = OperatorDefinition(
                name=one.name,
                plugin=one.plugin,
                inputs=_told_apart(resolved),
                outputs=one.outputs,
                variables=one.variables,
                cpu=one.cpu,
            )

    def _connect(self, keys: Keys, item: Input, source: OperatorDefinition) -> Input:
        known = {output.name.lower(): output for output in source.outputs}
        if item.output:
            output = known.get(item.output.lower())
        else:
            output = source.outputs[0] if len(source.outputs) == 1 else None
        if output is None:
            remedy = f"{source.name} has: {', '.join(known) or 'no outputs'}"
            self.fault((*keys, "name"), "011", f"no output {item.output!r} of {source.name!r}", remedy)
            return item
        if item.element_type and output.element_type and item.element_type != output.element_type:
            what = f"{source.name}.{output.name} gives {output.element_type}, this takes {item.element_type}"
            self.fault((*keys, "element-type"), "014", what, "make both ends agree")
        return Input(name=output.name, source=source.name, output=output.name, element_type=item.element_type)

    def _in_order(self, operators: list[OperatorDefinition]) -> list[OperatorDefinition]:
        ordered: list[OperatorDefinition] = []
        left = list(operators)
        while left:
            done = {one.name for one in ordered}
            ready = [one for one in left if one.upstream <= done]
            if not ready:
                cycle = " → ".join(one.name for one in left)
                self.fault(("operators",), "012", f"a cycle among {cycle}", "remove one connection")
                return ordered
            ordered += ready
            left = [one for one in left if one not in ready]
        return ordered


def _told_apart(inputs: list[Input]) -> tuple[Input, ...]:
    """Name two inputs of one name by where they come from: `seg.dicom`, `report.dicom`."""
    taken = [one.name for one in inputs]
    return tuple(
        replace(one, name=f"{one.source}.{one.name}") if taken.count(one.name) > 1 and one.source else one
        for one in inputs
    )


def _gate(operators: list[OperatorDefinition]) -> OperatorDefinition:
    """Every pipeline ends in the result gate: it reads the payload, all results, and the labels they were made from."""
    given = [
        Input(name=f"{one.name}.{output.name}", source=one.name, output=output.name, element_type=output.element_type)
        for one in operators
        for output in one.outputs
        if output.element_type in {"dicom", "labels"}
    ]
    payload = Input(name="payload", source=None, output="", element_type="dicom")
    return OperatorDefinition(
        name=GATE,
        plugin=GATE,
        inputs=(payload, *given),
        outputs=(Output(name="findings", element_type="json"),),
    )


def _without_free_text(value: Any) -> Any:  # noqa: ANN401  whatever the document holds
    """Drop what the language leaves free: `description` and `x-*`."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key != "description" and not re.match(r"x-", key)}
        return {key: _without_free_text(one) for key, one in kept.items()}
    if isinstance(value, list):
        return [_without_free_text(one) for one in value]
    return value


def _as_text(value: str | float | bool) -> str:  # noqa: FBT001  a YAML scalar
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def read_pipeline(name: str, raw: bytes) -> Pipeline:
    """Read a definition; `name` is what faults call the file. Raises InvalidPipelineError with all faults."""
    return _Reader(name, raw).read()
