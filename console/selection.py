"""What a replay is about, said by meaning: times, AE titles, modality, rule, pipeline, status, UIDs, expression."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from cel_expr_python import cel

from clarion.errors import ConfigError
from gateway.selecting import SelectedStudy, StudyFilter, select_studies
from streams.queries import read_story, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clarion.adapters.database import Database

# What `--where` may name: the fields of a study.
VARIABLES = {
    "study_uid": "string",
    "status": "string",
    "modality": "string",
    "study_date": "string",
    "accession_number": "string",
    "calling_ae": "string",
    "called_ae": "string",
    "received": "timestamp",
    "series": "int",
    "instances": "int",
    "rules": "list(string)",
}
_MAX_EXPRESSION = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is chosen; what is empty asks for nothing. `versions` are beginnings of a definition's digest."""

    studies: StudyFilter = field(default_factory=StudyFilter)
    rules: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    where: str = ""

    def described(self) -> dict[str, Any]:
        """Give what was said, without what was not, as JSON holds it."""
        said = {**asdict(self.studies), **asdict(self)}
        del said["studies"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items() if value}


class Expression:
    """A CEL expression about a study: typed, without side effects, and it always ends."""

    def __init__(self, text: str) -> None:
        """Compile it. Raises ConfigError that shows where it is wrong."""
        if len(text) > _MAX_EXPRESSION:
            raise ConfigError([f"--where: is longer than {_MAX_EXPRESSION} characters"])
        kinds = {"string": cel.Type.STRING, "int": cel.Type.INT, "timestamp": cel.Type.TIMESTAMP}
        variables = {name: kinds.get(kind) or cel.Type.List(cel.Type.STRING) for name, kind in VARIABLES.items()}
        try:
            self._expression = cel.NewEnv(variables=variables).compile(text)
        except RuntimeError as error:
            said = str(error).replace("INVALID_ARGUMENT: ERROR: <input>:", "").replace(" [INVALID_ARGUMENT]", "")
            raise ConfigError([f"--where: {said}", f"it may name: {', '.join(VARIABLES)}"]) from error
        if self._expression.return_type() != cel.Type.BOOL:
            raise ConfigError([f"--where: is a {self._expression.return_type().name()}, not true or false"])

    def holds(self, values: dict[str, Any]) -> bool:
        """Tell whether a study is as the expression says. Raises ConfigError when it cannot be told."""
        found = self._expression.eval(data=values)
        if found.type() != cel.Type.BOOL:
            raise ConfigError([f"--where: for study {values['study_uid']}: {found.value()}"])
        return bool(found.value())


def choose_studies(database: Database, selection: Selection) -> Iterator[SelectedStudy]:
    """Give the studies that are as selected, with those of their groups whose rule is."""
    expression = Expression(selection.where) if selection.where else None
    for study in select_studies(database, selection.studies):
        groups = tuple(one for one in study.groups if not selection.rules or one.rule in selection.rules)
        if not groups:
            continue
        status = _status(database, study, selection, expression)
        if selection.statuses and status not in selection.statuses:
            continue
        if expression is not None and not expression.holds(_values(study, status)):
            continue
        names = SelectedStudy.__dataclass_fields__
        yield SelectedStudy(**{**{name: getattr(study, name) for name in names}, "groups": groups})


def _status(database: Database, study: SelectedStudy, selection: Selection, expression: Expression | None) -> str:
    """Tell where a study stands, if anybody asks."""
    if not selection.statuses and (expression is None or "status" not in selection.where):
        return ""
    return state_of(read_story(database, study.study_uid))


def _values(study: SelectedStudy, status: str) -> dict[str, Any]:
    from datetime import datetime  # noqa: PLC0415  used here alone

    values = {name: getattr(study, name) for name in VARIABLES if hasattr(study, name)}
    received = datetime.fromisoformat(study.first_received)
    return {**values, "status": status, "received": received, "rules": sorted({one.rule for one in study.groups})}
