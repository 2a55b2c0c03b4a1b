"""The process of one operator: reads its environment, loads the plug-in, runs it, says how it went.

Exit status: 0 done, 1 a PermanentError (its class and reason are in the failure file), 2 anything else (the stack
trace is in the log). The environment is that of the pipeline language, section 6.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clarion.crashpoints import effect
from clarion.errors import ConfigError, PermanentError, describe
from clarion.loading import build, config_model, find
from clarion.processes import end_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clarion.plugins import Operator

OPERATORS = "clarion.operators"
_FACTS = {
    "job_id": "CLARION_JOB_ID",
    "attempt": "CLARION_ATTEMPT",
    "requested": "CLARION_REQUESTED",
    "pipeline": "CLARION_PIPELINE",
    "pipeline_version": "CLARION_PIPELINE_VERSION",
    "operator": "CLARION_OPERATOR",
}


@dataclass(frozen=True, slots=True)
class RunnerWorkspace:
    """What the operator may know of its surroundings."""

    outputs: Mapping[str, Path]
    facts: Mapping[str, str]

    def log(self, text: str) -> None:
        """Write a line to the job's log."""
        sys.stderr.write(f"{text}\n")


def _entries(text: str) -> dict[str, Path]:
    pairs = (entry.partition(":") for entry in text.split(";") if entry)
    return {name: Path(path) for name, _, path in pairs}


def _settings(plugin: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Give the variables that the operator's Config knows; an operator without one takes none."""
    model = config_model(find(OPERATORS, plugin))
    known = set(model.model_fields) if model is not None else set()
    settings = {name.lower(): value for name, value in variables.items()}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError([f"operator {plugin!r} has no variable {', '.join(unknown)}; it has: {sorted(known)}"])
    return settings


def run(environment: Mapping[str, str]) -> int:
    """Run the operator that the environment describes; gives the exit status."""
    try:
        plugin = environment["CLARION_PLUGIN"]
        variables = json.loads(environment.get("CLARION_VARIABLES", "{}"))
        operator: Operator = build(OPERATORS, plugin, _settings(plugin, variables))
        workspace = RunnerWorkspace(
            outputs=_entries(environment["NVIDIA_CLARA_OUTPUTPATHS"]),
            facts={name: environment.get(variable, "") for name, variable in _FACTS.items()},
        )
        with effect("runner.outputs"):
            operator.run(_entries(environment["NVIDIA_CLARA_INPUTPATHS"]), workspace)
    except (PermanentError, ConfigError) as error:
        said = json.dumps({"error": type(error).__name__, "reason": str(error)})
        Path(environment["CLARION_FAILURE_FILE"]).write_text(said)
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except Exception as error:  # noqa: BLE001  as said below
        # The one catch-all of this process: shown as our fault, with its stack trace in the operator's log, and
        # without the text of foreign exceptions, which may quote patient data.
        sys.stderr.write("".join(traceback.format_tb(error.__traceback__)) + f"{describe(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    # Warnings of libraries quote values of elements.
    warnings.simplefilter("ignore")
    end_with_parent(os.environ.get("CLARION_PARENT", ""))
    sys.exit(run(os.environ))
