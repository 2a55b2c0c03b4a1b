"""Change an uncompressed data set's transfer syntax on the way out; nothing is ever compressed or decompressed here."""

from __future__ import annotations

import io

from pydicom import dcmread, dcmwrite
from pydicom.filebase import DicomBytesIO
from pydicom.uid import UID, ImplicitVRLittleEndian

from clarion.dicom import part10
from clarion.errors import InvalidInstanceError


def to_implicit(data: bytes, syntax: str) -> bytes:
    """Encode a data set in implicit VR little endian. Raises InvalidInstanceError when it is compressed."""
    if UID(syntax).is_compressed and not UID(syntax).is_deflated:
        raise InvalidInstanceError("transfer-syntax-refused", f"the peer takes neither {syntax} nor uncompressed")
    file = part10(data, sop_class_uid="", sop_instance_uid="", transfer_syntax_uid=syntax)
    ds = dcmread(io.BytesIO(file), force=True)
    out = DicomBytesIO()
    dcmwrite(out, ds, implicit_vr=True, little_endian=True, force_encoding=True)
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return out.getvalue()
