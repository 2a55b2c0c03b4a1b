"""Type 1 and type 2 attributes of the objects we write (PS3.3 A.8, A.19, A.51, A.35.13): what the gate insists on.

Per modality and per nesting: the attributes that must be there with a value, and those that must at least be there.
Conditional attributes whose condition our objects always meet are listed as unconditional.
"""

from __future__ import annotations

Types = tuple[tuple[int, ...], tuple[int, ...]]
"""Type 1 tags, type 2 tags."""

_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES, _MODALITY = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00080060
_MANUFACTURER, _MODEL, _SERIAL, _SOFTWARE = 0x00080070, 0x00081090, 0x00181000, 0x00181020
_NAME, _ID, _BIRTH, _SEX = 0x00100010, 0x00100020, 0x00100030, 0x00100040
_STUDY_DATE, _STUDY_TIME, _REFERRING, _STUDY_ID, _ACCESSION = 0x00080020, 0x00080030, 0x00080090, 0x00200010, 0x00080050
_FRAME, _POSITION_REFERENCE, _INSTANCE_NUMBER = 0x00200052, 0x00201040, 0x00200013
_CONTENT_DATE, _CONTENT_TIME, _IMAGE_TYPE = 0x00080023, 0x00080033, 0x00080008
_PIXEL_FORMAT = (
    *(0x00280002, 0x00280004, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103),
    0x7FE00010,
)
_CODE = (0x00080100, 0x00080102, 0x00080104)

COMMON: Types = (
    (_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES, _MODALITY, _MANUFACTURER, _MODEL, _SERIAL, _SOFTWARE),
    (_NAME, _ID, _BIRTH, _SEX, _STUDY_DATE, _STUDY_TIME, _REFERRING, _STUDY_ID, _ACCESSION),
)

_SEGMENTS, _SHARED, _PER_FRAME = 0x00620002, 0x52009229, 0x52009230
_ORGANIZATION, _INDEX = 0x00209221, 0x00209222
_SEG: dict[tuple[int, ...], Types] = {
    (): (
        (
            *(_FRAME, _INSTANCE_NUMBER, _CONTENT_DATE, _CONTENT_TIME, _IMAGE_TYPE, *_PIXEL_FORMAT),
            # Segmentation Type, Segments, Content Label, frames, Lossy Image Compression, dimensions, groups.
            *(0x00620001, _SEGMENTS, 0x00700080, 0x00280008, 0x00282110, _ORGANIZATION, _INDEX, _SHARED, _PER_FRAME),
        ),
        (_POSITION_REFERENCE, 0x00700081, 0x00700084),
    ),
    # Number, label, algorithm type and name, category, type, tracking id and UID.
    (_SEGMENTS,): (
        (0x00620004, 0x00620005, 0x00620008, 0x00620009, 0x00620003, 0x0062000F, 0x00620020, 0x00620021),
        (),
    ),
    (_SEGMENTS, 0x00620003): (_CODE, ()),
    (_SEGMENTS, 0x0062000F): (_CODE, ()),
    (_ORGANIZATION,): ((0x00209164,), ()),
    (_INDEX,): ((0x00209165, 0x00209164), ()),
    # Plane orientation, pixel measures.
    (_SHARED,): ((0x00209116, 0x00289110), ()),
    (_SHARED, 0x00209116): ((0x00200037,), ()),
    (_SHARED, 0x00289110): ((0x00280030,), ()),
    # Frame content, plane position, segment identification, derivation image.
    (_PER_FRAME,): ((0x00209111, 0x00209113, 0x0062000A, 0x00089124), ()),
    (_PER_FRAME, 0x00209111): ((0x00209157,), ()),
}

_ROIS, _CONTOURS, _OBSERVATIONS, _FRAMES, _ROI_NUMBER = 0x30060020, 0x30060039, 0x30060080, 0x30060010, 0x30060084
_RTSTRUCT: dict[tuple[int, ...], Types] = {
    (): (
        (_FRAME, 0x30060002, _ROIS, _CONTOURS, _OBSERVATIONS, _FRAMES, 0x300E0002),
        (_POSITION_REFERENCE, 0x30060008, 0x30060009, 0x00081070),
    ),
    (_ROIS,): ((0x30060022, 0x30060024, 0x30060026), (0x30060036,)),
    (_CONTOURS,): ((_ROI_NUMBER, 0x30060040), ()),
    (_CONTOURS, 0x30060040): ((0x30060016, 0x30060042, 0x30060046, 0x30060050), ()),
    (_OBSERVATIONS,): ((0x30060082, _ROI_NUMBER, 0x300600A4), (0x300600A6,)),
    (_FRAMES,): ((_FRAME, 0x30060012), ()),
}

_EVIDENCE = 0x0040A375
_SR: dict[tuple[int, ...], Types] = {
    (): (
        # Value type, concept name, continuity, content, completion, verification, evidence.
        (
            *(_INSTANCE_NUMBER, _CONTENT_DATE, _CONTENT_TIME),
            *(0x0040A040, 0x0040A043, 0x0040A050, 0x0040A730, 0x0040A491, 0x0040A493, _EVIDENCE),
        ),
        (0x00081111, 0x0040A372),
    ),
    (0x0040A043,): (_CODE, ()),
    (_EVIDENCE,): ((_STUDY, 0x00081115), ()),
    (_EVIDENCE, 0x00081115): ((_SERIES, 0x00081199), ()),
}

_SECONDARY_CAPTURE: dict[tuple[int, ...], Types] = {
    (): ((0x00080064, _IMAGE_TYPE, *_PIXEL_FORMAT), (_INSTANCE_NUMBER,)),
}

BY_MODALITY: dict[str, dict[tuple[int, ...], Types]] = {
    "SEG": _SEG,
    "RTSTRUCT": _RTSTRUCT,
    "SR": _SR,
    "OT": _SECONDARY_CAPTURE,
}
