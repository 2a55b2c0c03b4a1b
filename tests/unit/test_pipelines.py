"""Pipeline definitions: the bundled one is accepted; every fault is named with its place, all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from clarion.definitions import read_definition
from clarion.errors import InvalidPipelineError
from orchestrator.pipelines import GATE, read_pipeline

HEAD = "api-version: 0.7.0\nname: p\noperators:\n"
READER = """- name: reader
  container: {image: 'operator:dicom-reader'}
  input: [{name: payload, path: /input}]
  output: [{name: volume, path: /output, type: stream, element-type: volume}]
"""


def segment(source: str = "{from: reader, name: volume, path: /input}", name: str = "segment") -> str:
    return f"""- name: {name}
  container: {{image: 'operator:chest-ct-segmentation'}}
  input: [{source}]
  output: [{{name: labels, path: /output, type: stream, element-type: labels}}]
"""


def faults(text: str) -> list[str]:
    with pytest.raises(InvalidPipelineError) as caught:
        read_pipeline("p.yaml", text.encode())
    return list(caught.value.faults)


def test_the_bundled_pipeline_is_accepted_and_ends_in_the_gate() -> None:
    pipeline = read_pipeline("chest-ct.yaml", read_definition("builtin:chest-ct", Path()))
    assert pipeline.operators[-1].name == GATE
    assert sorted(pipeline.results) == [
        ("overview", "dicom"), ("report", "dicom"), ("rtstruct", "dicom"), ("seg", "dicom"),
    ]  # fmt: skip
    # The gate reads the payload, the labels and every result, each under a name of its own.
    read = [one.name for one in pipeline.operators[-1].inputs]
    assert len(read) == len(set(read)) == 6


def test_operators_are_put_in_an_order_in_which_they_can_run() -> None:
    pipeline = read_pipeline("p.yaml", (HEAD + segment() + READER).encode())
    assert [one.name for one in pipeline.operators] == ["reader", "segment", GATE]


def test_free_text_and_later_fields_of_ones_own_are_left_alone() -> None:
    text = HEAD.replace("name: p", "name: p\ndescription: any\nx-owner: radiology")
    assert read_pipeline("p.yaml", (text + READER.replace("input:", "x-note: 1\n  input:")).encode()).name == "p"


FAULTS = [
    ("two", "not a mapping", "- 1", "p.yaml:1:1  PDL001"),
    ("yaml", "broken YAML", "a: [", "PDL001"),
    ("twice", "a key twice", HEAD + READER + "name: q\n", "PDL001"),
    ("version", "unknown version", (HEAD + READER).replace("0.7.0", "1.2.0"), "p.yaml:1:"),
    ("later", "what comes later", HEAD.replace("name: p", "name: p\nservices: []") + READER, "PDL003  services"),
    ("field", "unknown field", HEAD + READER.replace("input:", "inptu:"), "PDL003  operators[0].inptu"),
    ("missing", "no operators", "api-version: 0.7.0\nname: p\n", "PDL004  operators"),
    ("name", "a bad name", HEAD + READER.replace("name: reader", "name: 'a b'"), "PDL005  operators[0].name"),
    ("taken", "a name twice", HEAD + READER + READER, "p.yaml:8:"),
    ("gate", "the gate's name", HEAD + READER.replace("name: reader", f"name: {GATE}"), "PDL005"),
    ("type", "a wrong type", HEAD + READER + "  requests: {cpu: many}\n", "PDL006  operators[0].requests.cpu"),
    ("from", "nobody of that name", HEAD + READER + segment("{from: raeder, path: /i}"), "PDL010"),
    ("output", "no output of that name", HEAD + READER + segment("{from: reader, name: x, path: /i}"), "PDL011"),
    (
        "cycle", "a cycle",
        HEAD + segment("{from: b, path: /i}", "a") + segment("{from: a, path: /i}", "b"),
        "PDL012  operators: a cycle among a → b",
    ),
    ("path", "a path that leaves", HEAD + READER.replace("/input", "/../etc"), "PDL013"),
    ("same", "a path twice", HEAD + READER + segment("{from: reader, path: /i}, {path: /i}"), "PDL013"),
    (
        "ends", "ends that differ",
        HEAD + READER + segment("{from: reader, path: /i, type: stream, element-type: dicom}"),
        "PDL014",
    ),
    ("shm", "shared memory", HEAD + READER.replace("type: stream", "type: array"), "PDL015"),
    ("image", "a container", HEAD + READER.replace("operator:dicom-reader", "nvcr.io/x"), "PDL030"),
    ("operator", "an operator not installed", HEAD + READER.replace("dicom-reader", "nope"), "PDL030"),
]  # fmt: skip


@pytest.mark.parametrize(("_name", "_what", "text", "said"), FAULTS, ids=[one[0] for one in FAULTS])
def test_a_fault_has_place_code_and_remedy(_name: str, _what: str, text: str, said: str) -> None:
    found = faults(text)
    assert any(said in one for one in found), found
    assert all(one.startswith("p.yaml:") and "PDL" in one for one in found)


def test_all_faults_are_named_at_once() -> None:
    text = HEAD.replace("0.7.0", "9.9.9") + READER.replace("name: reader", "name: 'a b'") + "  gpu: 1\n"
    codes = {one.split("PDL")[1][:3] for one in faults(text)}
    assert codes == {"002", "003", "005"}
