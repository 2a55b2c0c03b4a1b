"""The tables' versions: each stage has migrations of its own, run by Alembic within one transaction.

Alembic is loaded only when there is something to do: a start that finds its tables as they should be pays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from clarion.errors import ConfigError

if TYPE_CHECKING:
    from alembic.config import Config

_ENVIRONMENT = Path(__file__).parent / "migrations"
# What development versions before the first migration kept.
_UNVERSIONED = "schema_versions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A stage's tables: the folder of its migrations, and the latest of them."""

    stage: str
    folder: Path
    head: str

    @property
    def version_table(self) -> str:
        """Where the database keeps which migration the stage is at."""
        return f"{self.stage}_version"


def is_current(connection: sa.Connection, schema: Schema) -> bool:
    """Tell whether the tables are as the latest migration leaves them."""
    return _version(connection, schema) == schema.head


def _version(connection: sa.Connection, schema: Schema) -> str | None:
    if not sa.inspect(connection).has_table(schema.version_table):
        return None
    table = sa.table(schema.version_table, sa.column("version_num"))
    return connection.execute(sa.select(table.c.version_num)).scalar_one_or_none()


def migrate(connection: sa.Connection, schema: Schema) -> None:
    """Bring the tables to the latest migration. Raises ConfigError when they are newer, or older than the first."""
    found = _version(connection, schema)
    if found == schema.head:
        return
    if found is not None and found > schema.head:
        raise ConfigError(
            [f"database: {schema.stage!r} has tables of version {found}, known here is {schema.head}; run a newer one"]
        )
    if found is None and sa.inspect(connection).has_table(_UNVERSIONED):
        raise ConfigError(["database: made by a development version before 0.1.0; begin with another `data` folder"])
    from alembic import command  # noqa: PLC0415  slow to load, and seldom needed

    command.upgrade(_config(connection, schema), "head")


def _config(connection: sa.Connection, schema: Schema) -> Config:
    from alembic.config import Config  # noqa: PLC0415  as above

    config = Config()
    config.set_main_option("script_location", str(_ENVIRONMENT).replace("%", "%%"))
    config.set_main_option("version_locations", str(schema.folder).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes.update(connection=connection, version_table=schema.version_table)
    return config
