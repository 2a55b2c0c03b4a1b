"""The result gate: reads what was written with a parser of its own and says which rules it breaks.

Nothing leaves that the gate has a finding about (writers specification, section 4). Rules here: G01 whole encoding,
G02 type 1 and type 2 attributes, G04 patient, study and frame of reference of the source, G05 UIDs derived and unique,
G06 references resolve and are in the evidence, G07 to G09 SEG geometry, frames and segments, G10 SEG voxels equal the
labels, G11 contours closed and in plane, G12 filled they are the labels, G13 SR content complete, G14 volumes are the
labels', G16 qualification marked and no private element.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from clarion.dicom import read_file_meta, read_headers
from clarion.elements import Walker
from clarion.errors import InvalidInstanceError
from clarion.labels import load_labels
from writers.gate_rtstruct import check_structure_set
from writers.gate_seg import check_segmentation
from writers.gate_sr import check_report
from writers.gate_types import BY_MODALITY, COMMON
from writers.gate_view import Expected, View
from writers.identity import JobIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pydicom import Dataset

    from clarion.labels import Labels
    from clarion.plugins import Workspace

    Check = Callable[[View, Expected], Iterator[tuple[str, str]]]

_CHECKS: dict[str, Check] = {"SEG": check_segmentation, "RTSTRUCT": check_structure_set, "SR": check_report}
_EQUAL_TO_SOURCE = (
    ("StudyInstanceUID", 0x0020000D),
    ("PatientID", 0x00100020),
    ("PatientName", 0x00100010),
    ("PatientBirthDate", 0x00100030),
    ("PatientSex", 0x00100040),
    ("StudyDate", 0x00080020),
    ("AccessionNumber", 0x00080050),
)
_MEDIA_CLASS, _MEDIA_UID = 0x00020002, 0x00020003
_FRAME_OF_REFERENCE = 0x00200052
_SERIES_UID, _SOP_INSTANCE, _SOP_CLASS, _MODALITY = 0x0020000E, 0x00080018, 0x00080016, 0x00080060
_NEED_A_FRAME_OF_REFERENCE = frozenset(("SEG", "RTSTRUCT"))
_MOST_SAID = 5
_NOT_FOR_CLINICAL_USE = "not for clinical use"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule that a result breaks."""

    rule: str
    output: str
    detail: str


class ResultGate:
    """The operator that every pipeline ends in."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write `findings.json`: an empty list when everything may leave."""
        source = [ds for _, ds in read_headers(inputs["payload"])]
        labelled = [load_labels(path) for name, path in inputs.items() if (path / "segments.json").exists()]
        results = [
            (name.partition(".")[0], path)
            for name, folder in inputs.items()
            if name != "payload"
            for path in sorted(folder.rglob("*.dcm"))
        ]
        labels = labelled[0] if labelled else None
        findings = check_results(results, source, labels, JobIdentity.of(workspace.facts))
        for one in findings:
            workspace.log(f"{one.rule} {one.output}: {one.detail}")
        text = json.dumps([asdict(one) for one in findings])
        (workspace.outputs["findings"] / "findings.json").write_text(text)


def check_results(
    results: list[tuple[str, Path]], source: list[Dataset], labels: Labels | None, job: JobIdentity
) -> list[Finding]:
    """Check the files of a result set against each other, their source and the labels they were made from."""
    findings: list[Finding] = []
    views: list[View] = []
    for output, path in results:
        try:
            data = path.read_bytes()
            meta, begin = read_file_meta(data)
            views.append(View(output, path.stem, data[begin:], meta))
        except InvalidInstanceError as error:
            findings.append(Finding(rule="G01", output=output, detail=str(error)))
    if not results:
        findings.append(Finding(rule="G08", output="", detail="the job made no result"))
    # References may go to anything in the payload; what a result is about is the series that was labelled.
    known = {str(ds.SOPInstanceUID): str(ds.SOPClassUID) for ds in source}
    if labels is not None:
        labelled = {one.sop_instance_uid for one in labels.volume.sources}
        source = [ds for ds in source if str(ds.SOPInstanceUID) in labelled]
    known |= {view.text(_SOP_INSTANCE): view.text(_SOP_CLASS) for view in views}
    expected = Expected(source=source, labels=labels, job=job)
    seen: set[str] = set()
    for view in views:
        try:
            said = [*_common(view, expected, known), *_unique(view, seen)]
            check = _CHECKS.get(view.text(_MODALITY))
            said += check(view, expected) if check is not None else ()
        except (InvalidInstanceError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            said = [("G01", f"a value cannot be read: {type(error).__name__}")]
        findings += [Finding(rule=rule, output=view.output, detail=detail) for rule, detail in said]
    return findings


def _common(view: View, expected: Expected, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield from _nesting(view)
    yield from _types(view)
    yield from _same_as_source(view, expected)
    yield from _derived(view, expected.job)
    # An RTSTRUCT cites its study with the same attribute (PS3.3 C.8.8.5, RT Referenced Study Sequence).
    studies = {str(ds.StudyInstanceUID) for ds in expected.source}
    strays = [
        f"reference to {uid} resolves to nothing" if uid not in known else f"{uid} is cited with another SOP Class"
        for sop_class, uid in view.references()
        if uid not in studies and known.get(uid) != sop_class
    ]
    yield from (("G06", one) for one in strays[:_MOST_SAID])
    if any(tag >> 16 & 1 for tag in view.top):
        yield "G16", "a private element"
    if _NOT_FOR_CLINICAL_USE not in view.described().lower():
        yield "G16", f"nothing says that it is {_NOT_FOR_CLINICAL_USE}"


def _types(view: View) -> Iterator[tuple[str, str]]:
    """Every type 1 attribute has a value, every type 2 attribute is there, at every nesting that the table names."""
    said: list[str] = []
    for path, (first, second) in [((), COMMON), *BY_MODALITY.get(view.text(_MODALITY), {}).items()]:
        where = "".join(f"{tag:08X} > " for tag in path)
        for item in view.items_at(path):
            said += [
                f"type 1 attribute {where}{tag:08X} is absent or empty"
                for tag in first
                if tag not in item or view.is_empty(item[tag])
            ]
            said += [f"type 2 attribute {where}{tag:08X} is absent" for tag in second if tag not in item]
    yield from (("G02", one) for one in dict.fromkeys(said))


def _nesting(view: View) -> Iterator[tuple[str, str]]:
    if (view.meta.get(_MEDIA_CLASS), view.meta.get(_MEDIA_UID)) != (view.text(_SOP_CLASS), view.text(_SOP_INSTANCE)):
        yield "G01", "the file meta information names another instance or class"
    tags = [element.tag for element in Walker(view.data, view.syntax).elements()]
    if tags != sorted(set(tags)):
        yield "G01", "tags do not ascend"
    if any((element.end - element.start) % 2 for element in view.top.values()):
        yield "G01", "an element has an odd length"


def _same_as_source(view: View, expected: Expected) -> Iterator[tuple[str, str]]:
    # All of one instance's: the patient of one study and the number of another must not pass together.
    said = tuple(view.raw(tag).strip(b" \0") for _, tag in _EQUAL_TO_SOURCE)
    wanted = {tuple(_plain(ds, keyword) for keyword, _ in _EQUAL_TO_SOURCE) for ds in expected.source}
    if said not in wanted:
        nearest = max(wanted, key=lambda one: sum(a == b for a, b in zip(one, said, strict=True)), default=())
        for (keyword, _), is_, be in zip(_EQUAL_TO_SOURCE, said, nearest, strict=False):
            if is_ != be:
                yield "G04", f"{keyword} is not that of the source"
        if not nearest:
            yield "G04", "nothing is known of the source"
    frames = {str(ds.get("FrameOfReferenceUID", "")) for ds in expected.source}
    if expected.labels is not None:
        frames = {expected.labels.volume.geometry.frame_of_reference_uid}
    needed = view.text(_MODALITY) in _NEED_A_FRAME_OF_REFERENCE
    if (needed or _FRAME_OF_REFERENCE in view.top) and view.text(_FRAME_OF_REFERENCE) not in frames:
        yield "G04", "FrameOfReferenceUID is not that of the source"


def _plain(ds: Dataset, keyword: str) -> bytes:
    """Give the source's value as bytes, as it was encoded there."""
    if keyword not in ds:
        return b""
    raw = ds.get_item(keyword)
    value = getattr(raw, "value", b"")
    if isinstance(value, bytes):
        return value.strip(b" \0")
    original = getattr(value, "original_string", None)
    if isinstance(original, bytes):
        return original.strip(b" \0")
    return str(value if value is not None else "").encode("utf-8").strip(b" \0")


def _derived(view: View, job: JobIdentity) -> Iterator[tuple[str, str]]:
    """A file KIND.dcm has the UIDs that the job derives for KIND: a second attempt makes the same ones."""
    for name, tag, part in (("SOP Instance", _SOP_INSTANCE, "instance"), ("Series Instance", _SERIES_UID, "series")):
        if view.text(tag) != job.uid(view.kind, part):
            yield "G05", f"the {name} UID is not the one that the job derives for {view.kind!r}"


def _unique(view: View, seen: set[str]) -> Iterator[tuple[str, str]]:
    uid = view.text(_SOP_INSTANCE)
    if uid in seen:
        yield "G05", f"SOP Instance UID {uid} is used twice in the set"
    seen.add(uid)
