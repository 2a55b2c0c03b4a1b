"""The result gate's checks of a report: complete, with content, evidence, finite numbers; volumes are the labels'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from writers.gate_view import Expected, Item, View

_CONTENT, _COMPLETION, _VALUE = 0x0040A730, 0x0040A491, 0x0040A30A
_VALUE_TYPE, _NAME, _CODE_VALUE, _UID, _MEASURED = 0x0040A040, 0x0040A043, 0x00080100, 0x0040A124, 0x0040A300
_REFERENCED_SOP, _REFERENCED, _REFERENCED_SEGMENT = 0x00081199, 0x00081155, 0x0062000B
_EVIDENCE, _SERIES, _INSTANCES = 0x0040A375, 0x00081115, 0x00081199
_GROUP, _TRACKING_UID, _VOLUME = "125007", "112040", "118565006"
_VOLUME_PART = 1e-3


def check_report(view: View, expected: Expected) -> Iterator[tuple[str, str]]:
    """Check that a report is complete, lists what it cites, has finite numbers, and volumes that are the labels'."""
    if view.text(_COMPLETION) != "COMPLETE":
        yield "G13", "completion flag is not COMPLETE"
    if not view.items(_CONTENT):
        yield "G13", "no content"
    numbers = [view.text_of(one) for one in view.everywhere(_VALUE)]
    if not numbers:
        yield "G13", "no measurement"
    for text in numbers:
        if not _is_finite(text):
            yield "G13", f"a numeric value {text[:16]!r}"
    yield from _evidence(view)
    yield from _volumes(view, expected)


def _is_finite(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _below(view: View, items: list[Item]) -> Iterator[Item]:
    for item in items:
        yield item
        if _CONTENT in item:
            yield from _below(view, view.items_of(item[_CONTENT]))


def _evidence(view: View) -> Iterator[tuple[str, str]]:
    """What the content cites is in the evidence (PS3.3 C.17.2)."""
    listed = {view.text_in(one, _REFERENCED) for one in view.items_at((_EVIDENCE, _SERIES, _INSTANCES))}
    cited = {view.text_in(item, _REFERENCED_SOP, _REFERENCED) for item in _below(view, view.items(_CONTENT))} - {""}
    if cited - listed:
        yield "G06", f"{len(cited - listed)} cited instances are not in the evidence"


def _volumes(view: View, expected: Expected) -> Iterator[tuple[str, str]]:
    """Every segment of the labels has a group, tracked as in the SEG, with the volume of its voxels."""
    if expected.labels is None:
        return
    per_voxel = expected.labels.volume.geometry.voxel_volumes_ml
    groups = {}
    for item in _below(view, view.items(_CONTENT)):
        if view.text_in(item, _NAME, _CODE_VALUE) == _GROUP and _CONTENT in item:
            uid, volume, segment = _group(view, item)
            if segment:
                groups[uid] = volume
    wanted = {
        expected.job.tracking_uid(one): float(
            (np.count_nonzero(expected.labels.mask(one), axis=(1, 2)) * per_voxel).sum()
        )
        for one in expected.labels.written()
    }
    if set(groups) != set(wanted):
        yield "G14", "the measured segments are not those of the labels, by their tracking UIDs"
        return
    for uid, volume in wanted.items():
        if not abs(groups[uid] - volume) <= _VOLUME_PART * volume:
            yield "G14", f"a volume of {groups[uid]:.6g} ml; the labels have {volume:.6g} ml"


def _group(view: View, group: Item) -> tuple[str, float, bool]:
    """Give a measurement group's tracking UID, its volume (NaN when it has none), and whether it is of a segment."""
    uid, volume, segment = "", float("nan"), False
    for item in view.items_of(group[_CONTENT]):
        name = view.text_in(item, _NAME, _CODE_VALUE)
        if name == _TRACKING_UID:
            uid = view.text_in(item, _UID)
        elif name == _VOLUME:
            text = view.text_in(item, _MEASURED, _VALUE)
            volume = float(text) if _is_finite(text) else volume
        segment |= view.inside(item, _REFERENCED_SOP, _REFERENCED_SEGMENT) is not None
    return uid, volume, segment
