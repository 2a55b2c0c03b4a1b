"""What every command shares: the options, how its body is run, how JSON is printed. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from console.app import App

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The configuration file.", envvar=None)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DEFAULT_CONFIG = Path("clarion.yaml")


def run(command: Callable[[], int]) -> None:
    """Run a command's body; errors of ours become a line on standard error and an exit status."""
    from clarion.errors import ClarionError  # noqa: PLC0415  quick --help
    from console.exits import INTERRUPTED, status_of  # noqa: PLC0415  quick --help

    # Whatever is written is the owner's alone, also below a folder that others may enter.
    os.umask(0o077)
    try:
        status = command()
    except ClarionError as error:
        typer.echo(f"clarion: {error}", err=True)
        status = status_of(error)
    except KeyboardInterrupt:
        status = INTERRUPTED
    raise typer.Exit(status)


def print_json(value: Any) -> None:  # noqa: ANN401  anything JSON can hold
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


def reader(config: Path) -> App:
    """Make what a reading command needs. Raises ConfigError when there is no data folder yet."""
    from clarion.adapters.clock import SystemClock  # noqa: PLC0415  quick --help
    from clarion.errors import ConfigError  # noqa: PLC0415  quick --help
    from clarion.service import open_wakeup  # noqa: PLC0415  quick --help
    from console.app import App  # noqa: PLC0415  quick --help
    from console.checks import check_config  # noqa: PLC0415  quick --help

    checked = check_config(config, certificates=False)
    if not (checked.config.data / "run").is_dir():
        raise ConfigError(
            [f"data: nothing has run on {checked.config.data} yet; start it with `clarion up -c {config}`"]
        )
    return App(checked=checked, wakeup=open_wakeup(checked.config.data, "reader"), clock=SystemClock())
