"""One attempt of a job: its folder, its operators, what each is given, and what they produced."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clarion.attributes import read_attributes
from clarion.crashpoints import effect
from clarion.dicom import read_header, split_part10
from clarion.errors import OperatorError
from clarion.model import (
    JobId,
    ObjectRef,
    OperatorWork,
    ResultInstance,
    ResultSet,
    SeriesUid,
    SopInstanceUid,
    StudyUid,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from clarion.ports import ObjectStore
    from orchestrator.ledger import Job
    from orchestrator.pipelines import OperatorDefinition, Pipeline

PAYLOAD = "payload"
_MODALITY = "00080060"
MAX_LOG_KEPT = 2**20
MAX_RESULT_BYTES = 2 * 2**30


@dataclass(slots=True)
class Attempt:
    """What the engine remembers of an attempt while it runs; all of it can be made again from the ledger."""

    job: Job
    number: int
    pipeline: Pipeline
    folder: Path
    deadline: float
    running: set[str] = field(default_factory=set)
    completed: set[str] = field(default_factory=set)

    def ready(self) -> list[OperatorDefinition]:
        """List the operators whose upstream has completed and that have not been started."""
        begun = self.running | self.completed
        return [one for one in self.pipeline.operators if one.name not in begun and one.upstream <= self.completed]

    @property
    def done(self) -> bool:
        """Whether every operator has completed."""
        return len(self.completed) == len(self.pipeline.operators)

    def work_id(self, operator: str) -> str:
        """Name an operator's work for the executor."""
        return f"{self.job.job_id}/{self.number}/{operator}"

    def outputs_of(self, operator: str) -> Path:
        """Where an operator's outputs are."""
        return self.folder / "operators" / operator

    def output_folder(self, operator: str, output: str) -> Path:
        """Where one of an operator's outputs is."""
        return self.outputs_of(operator) / output

    def log_file(self, operator: str) -> Path:
        """Where an operator's log is."""
        return self.folder / "logs" / f"{operator}.log"

    def failure_file(self, operator: str) -> Path:
        """Where an operator says why it failed."""
        return self.folder / "logs" / f"{operator}.failure.json"

    def work(self, operator: OperatorDefinition, timeout_s: float) -> OperatorWork:
        """Make an operator ready for the executor: its folders, and its environment (pipeline language, section 6)."""
        for output in operator.outputs:
            self.output_folder(operator.name, output.name).mkdir(parents=True, exist_ok=True)
        self.log_file(operator.name).parent.mkdir(parents=True, exist_ok=True)
        inputs = [(one.name, self._input_folder(one.source, one.output)) for one in operator.inputs]
        outputs = [(one.name, self.output_folder(operator.name, one.name)) for one in operator.outputs]
        return OperatorWork(
            work_id=self.work_id(operator.name),
            operator=operator.name,
            command=(sys.executable, "-P", "-m", "operators.runner"),
            environment={
                **_base_environment(operator.cpu),
                "HOME": str(self.folder),
                "NVIDIA_CLARA_INPUTPATHS": _paths(inputs),
                "NVIDIA_CLARA_OUTPUTPATHS": _paths(outputs),
                "CLARION_OPERATOR": operator.name,
                "CLARION_PLUGIN": operator.plugin,
                "CLARION_VARIABLES": json.dumps(dict(operator.variables)),
                "CLARION_FAILURE_FILE": str(self.failure_file(operator.name)),
                "CLARION_PARENT": str(os.getpid()),
                **self._facts(),
            },
            folder=str(self.folder),
            log=str(self.log_file(operator.name)),
            timeout_s=timeout_s,
        )

    def _facts(self) -> Mapping[str, str]:
        job = self.job
        return {
            "CLARION_JOB_ID": job.job_id,
            "CLARION_ATTEMPT": str(self.number),
            "CLARION_REQUESTED": job.requested,
            "CLARION_PIPELINE": job.pipeline_id,
            "CLARION_PIPELINE_VERSION": job.definition.digest[:12],
        }

    def _input_folder(self, source: str | None, output: str) -> Path:
        return self.folder / PAYLOAD / "dcm" if source is None else self.output_folder(source, output)

    def failure_of(self, operator: str, reason: str) -> tuple[str, str]:
        """Give the cause and the reason of an operator's failure: what it said itself, else what the executor saw."""
        try:
            said = json.loads(self.failure_file(operator).read_text())
            return str(said["error"]), str(said["reason"])
        except (OSError, ValueError, KeyError):
            return "OperatorError", reason or "ended without saying why; see its log"

    def keep_log(self, operator: str, store: ObjectStore) -> ObjectRef | None:
        """Keep the end of an operator's log as an object."""
        try:
            log = self.log_file(operator).read_bytes()[-MAX_LOG_KEPT:]
        except OSError:
            return None
        with effect("artifact.store"):
            return store.put(log)

    def keep_results(self, store: ObjectStore) -> tuple[ResultSet, ObjectRef]:
        """Keep every result as an object, and the set that names them. Raises OperatorError for what is not DICOM."""
        instances = tuple(
            self._keep_result(store, path, f"{operator}/{output}")
            for operator, output in self.pipeline.results
            for path in sorted(self.output_folder(operator, output).rglob("*.dcm"))
        )
        result_set = ResultSet(job_id=JobId(self.job.job_id), instances=instances)
        with effect("resultset.store"):
            return result_set, store.put(result_set.encode())

    def _keep_result(self, store: ObjectStore, path: Path, output: str) -> ResultInstance:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise OperatorError(f"{output}: {path.name} has more than {MAX_RESULT_BYTES} bytes")
        data, syntax = split_part10(path.read_bytes())
        header = read_header(data, syntax)
        if header.fault is not None:
            raise OperatorError(f"{output}: {path.name} is not a whole data set: {header.fault}")
        with effect("artifact.store"):
            ref = store.put(data)
        return ResultInstance(
            output=output,
            modality=read_attributes(data, syntax).get(_MODALITY, "OT"),
            study_uid=StudyUid(header.study_uid),
            series_uid=SeriesUid(header.series_uid),
            sop_instance_uid=SopInstanceUid(header.sop_instance_uid),
            sop_class_uid=header.sop_class_uid,
            transfer_syntax_uid=syntax,
            object=ref,
        )

    def findings(self, gate: str) -> list[dict[str, str]]:
        """Read what the result gate found."""
        text = (self.output_folder(gate, "findings") / "findings.json").read_text()
        found: list[dict[str, str]] = json.loads(text)
        return found


def _base_environment(cpu: int) -> dict[str, str]:
    """What every operator has: no secret and no setting of ours leaks into it."""
    threads = str(max(1, cpu))
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
        "NVIDIA_CLARA_NOSYNCLOCK": "TRUE",
    }


def _paths(entries: list[tuple[str, Path]]) -> str:
    return ";".join(f"{name}:{path}" for name, path in entries)
