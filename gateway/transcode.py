"""Change an uncompressed data set's transfer syntax on the way out; nothing is ever compressed or decompressed here."""

from __future__ import annotations

import io

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from clarion.dicom import part10
from clarion.elements import DEFLATED_LE, EXPLICIT_LE, IMPLICIT_LE
from clarion.errors import InvalidInstanceError

# What is offered beside the stored transfer syntax, in this order (registry specification, 7.2).
FALLBACKS = (EXPLICIT_LE, IMPLICIT_LE)
_PLAIN = frozenset((EXPLICIT_LE, IMPLICIT_LE, DEFLATED_LE))


def convert(data: bytes, syntax: str, target: str) -> bytes:
    """Encode a little endian data set in another of the FALLBACKS, without preamble and file meta information.

    Raises InvalidInstanceError for what would have to be decompressed, byte-swapped, or cannot be read.
    """
    if syntax not in _PLAIN:
        raise InvalidInstanceError("transfer-syntax-refused", f"the peer takes neither {syntax} nor uncompressed")
    try:
        file = part10(data, sop_class_uid="1.2", sop_instance_uid="1.2", transfer_syntax_uid=syntax)
        ds = dcmread(io.BytesIO(file))
        out = DicomBytesIO()
        out.is_little_endian, out.is_implicit_VR = True, target == IMPLICIT_LE
        write_dataset(out, ds)
    except (InvalidDicomError, ValueError, TypeError, KeyError, OSError) as error:
        raise InvalidInstanceError("not-convertible", type(error).__name__) from error
    return bytes(out.getvalue())
