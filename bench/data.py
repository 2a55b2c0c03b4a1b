"""Instances to send, framed before any clock starts: PDUs as they go over the wire, and where their UIDs stand in them.

`ct`: 512 x 512 slices of the phantom, 0.53 MB. `small`: Comprehensive SR of 45 measurements, 10.5 kB. `tiny`: 1 kB.
`big`: one instance of `--big-mb`. Every pass has new SOP Instance UIDs of the same length, patched into the frames.
"""

from __future__ import annotations

import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydicom import Dataset, dcmread, dcmwrite
from pydicom.uid import ExplicitVRLittleEndian

from clarion.dicom import part10
from clarion.testing.phantom import PhantomSpec, make_phantom, write_phantom
from gateway.wire import commands, pdu

CT = "1.2.840.10008.5.1.4.1.1.2"
SR = "1.2.840.10008.5.1.4.1.1.88.33"
CONTEXTS = {CT: 1, SR: 3}
"""The presentation context that each class is sent in."""
EXPLICIT = "1.2.840.10008.1.2.1"
PDU_LENGTH = 131072
_UID = "1.2.826.0.1.3680043.9.7433.1.{:020d}"
UID_BYTES = len(_UID.format(0))
_TEMPLATES = 8
_MEASUREMENTS = 45


def class_of(kind: str) -> str:
    """Give the SOP Class of a kind's instances."""
    return SR if kind == "small" else CT


def uid_of(number: int) -> str:
    """Give the SOP Instance UID of the instance with a number; all are equally long."""
    return _UID.format(10**19 + number)


@dataclass
class Frame:
    """A C-STORE-RQ ready to be sent: command and data set in PDUs; `places` are where the UID stands in it."""

    data: bytearray
    data_set: bytes
    places: tuple[int, ...]
    places_in_data_set: tuple[int, ...]

    def patch(self, number: int) -> bytearray:
        """Give the frame the UID of an instance."""
        raw = uid_of(number).encode()
        for place in self.places:
            self.data[place : place + UID_BYTES] = raw
        return self.data

    def expected(self, number: int) -> bytes:
        """Give the data set as it must be stored under that UID."""
        data = bytearray(self.data_set)
        raw = uid_of(number).encode()
        for place in self.places_in_data_set:
            data[place : place + UID_BYTES] = raw
        return bytes(data)


def frames(kind: str, series: int, big_mb: int = 256, max_length: int = PDU_LENGTH) -> list[Frame]:
    """Make the frames of one series, in PDUs of the receiver's size: `kind` is ct, small, tiny or big."""
    return [_frame(one, class_of(kind), max_length) for one in data_sets(kind, series, big_mb)]


def data_sets(kind: str, series: int, big_mb: int = 256) -> list[bytes]:
    """Make the encoded data sets of one series (explicit VR little endian), with the UID of instance 0."""
    with tempfile.TemporaryDirectory() as folder:
        phantom = make_phantom(PhantomSpec(slices=_TEMPLATES, size=512 if kind == "ct" else 64, seed=series))
        return [_encode(path, kind, series, big_mb) for path in write_phantom(phantom, Path(folder))][
            : 1 if kind == "big" else None
        ]


def write_files(kind: str, count: int, first: int, folder: Path) -> list[str]:
    """Write Part 10 files of new instances, numbered from `first`; give their paths."""
    folder.mkdir(parents=True)
    made, paths = data_sets(kind, 0), []
    for number in range(count):
        uid = uid_of(first + number)
        data = made[number % len(made)].replace(uid_of(0).encode(), uid.encode())
        path = folder / f"{number}.dcm"
        path.write_bytes(part10(data, sop_class_uid=class_of(kind), sop_instance_uid=uid, transfer_syntax_uid=EXPLICIT))
        paths.append(str(path))
    return paths


def _encode(path: Path, kind: str, series: int, big_mb: int) -> bytes:
    ds = dcmread(path)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid_of(0)
    ds.StudyInstanceUID = f"1.2.826.0.1.3680043.9.7433.2.{series}"
    ds.SeriesInstanceUID = f"1.2.826.0.1.3680043.9.7433.3.{series}"
    if kind == "small":
        ds = _report(ds)
    elif kind == "tiny":
        keep = {"SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "PatientID"}
        for element in list(ds):
            if element.keyword not in keep:
                del ds[element.tag]
        ds.add_new(0x00420011, "OB", bytes(600))
    elif kind == "big":
        ds.add_new(0x00420011, "OB", bytes(big_mb * 2**20))
        del ds.PixelData
    target = path.with_suffix(".out")
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dcmwrite(target, ds, enforce_file_format=True)
    raw = target.read_bytes()
    length = struct.unpack_from("<I", raw, 140)[0]
    return raw[144 + length :]


def _report(image: Dataset) -> Dataset:
    """Make a report of measurements on the patient and study of an image."""
    report = Dataset()
    report.file_meta = image.file_meta
    # All that is said of patient, study, series and equipment, nothing that is said of the image.
    for element in image:
        if (
            element.tag.group in {0x0008, 0x0010, 0x0020}
            and element.tag < 0x00200020
            and element.keyword != "ImageType"
        ):
            report.add(element)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = SR
    report.Modality, report.ValueType, report.ContinuityOfContent = "SR", "CONTAINER", "SEPARATE"
    report.CompletionFlag, report.VerificationFlag = "COMPLETE", "UNVERIFIED"
    report.ConceptNameCodeSequence = [_code("126000", "Imaging Measurement Report")]
    report.ContentSequence = [_measurement(number) for number in range(_MEASUREMENTS)]
    return report


def _measurement(number: int) -> Dataset:
    value, item = Dataset(), Dataset()
    value.NumericValue = f"{number}.25"
    value.MeasurementUnitsCodeSequence = [_code("mm", "millimetre")]
    item.RelationshipType, item.ValueType = "CONTAINS", "NUM"
    item.ConceptNameCodeSequence = [_code(str(121200 + number), f"Measurement number {number}")]
    item.MeasuredValueSequence = [value]
    return item


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def _frame(data_set: bytes, sop_class: str, max_length: int) -> Frame:
    uid, context = uid_of(0), CONTEXTS[sop_class]
    command = commands.make([
        (commands.AFFECTED_CLASS, commands.ui(sop_class)), (commands.FIELD, commands.u16(commands.C_STORE_RQ)),
        (commands.MESSAGE_ID, commands.u16(1)), (commands.PRIORITY, commands.u16(commands.MEDIUM)),
        (commands.DATA_SET_TYPE, commands.u16(commands.WITH_DATA_SET)), (commands.AFFECTED_INSTANCE, commands.ui(uid)),
    ])  # fmt: skip
    data = bytearray(pdu.p_data(context, pdu.COMMAND, command) + pdu.p_data(context, 0, data_set, max_length))
    return Frame(data, data_set, _find(bytes(data), uid), _find(data_set, uid))


def _find(data: bytes, uid: str) -> tuple[int, ...]:
    places, at = [], data.find(uid.encode())
    while at >= 0:
        places.append(at)
        at = data.find(uid.encode(), at + 1)
    return tuple(places)
