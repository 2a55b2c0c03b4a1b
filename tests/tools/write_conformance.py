"""Write docs/conformance.md from the code: `python tests/tools/write_conformance.py`. A test says when it is stale."""

from __future__ import annotations

from pathlib import Path

from clarion.config import GatewayConfig, ScpConfig, ScpTlsConfig, StowConfig
from clarion.dicom import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from gateway.access import REJECTIONS
from gateway.association import LINGER_S, MOST_INSTANCES
from gateway.intake import (
    CANNOT_UNDERSTAND,
    DOES_NOT_MATCH_SOP_CLASS,
    OUT_OF_RESOURCES,
    PROCESSING_FAILURE,
    SUCCESS,
)
from gateway.receiver import STALL_S
from gateway.uploads import MOST_INSTANCES as MOST_IN_A_REQUEST
from gateway.wire import pdu
from gateway.wire.acceptance import PLAIN, STORAGE, STORAGE_COMMITMENT, STORAGE_ROOT, VERIFICATION
from gateway.wire.secure import CIPHERS

STOW_PORT = StowConfig.model_fields["port"].default
TLS_PORT = ScpTlsConfig.model_fields["port"].default
TARGET = Path(__file__).parents[2] / "docs" / "conformance.md"

STATUSES = (
    (SUCCESS, "data set and journal record are synced to disk"),
    (OUT_OF_RESOURCES, "disk below the reserve, or not writable; may be sent again"),
    (DOES_NOT_MATCH_SOP_CLASS, "the data set contradicts the SOP Class or Instance UID of the request; quarantined"),
    (CANNOT_UNDERSTAND, "empty, cut or malformed, or an identifying UID is missing or invalid; quarantined"),
    (PROCESSING_FAILURE, "a fault of ours; the Error Comment has a log id"),
    (0x0122, "not a Storage SOP Class, or a private one while those are switched off"),
    (0x0124, "the peer may not store here, or not under this called AE title"),
)


def text() -> str:
    """Give the document."""
    scp, scu = ScpConfig(), GatewayConfig().scu
    rejections = "\n".join(
        f"| {one.result}/{one.source}/{one.reason} | `{one.check}` |" for one in sorted(REJECTIONS, key=str)
    )
    statuses = "\n".join(f"| 0x{code:04X} | {why} |" for code, why in STATUSES)
    plain = ", ".join(PLAIN)
    outside = "\n".join(f"| {uid} |" for uid in sorted(STORAGE))
    return f"""# DICOM conformance statement

In the layout of PS3.2. Generated from the code by `tests/tools/write_conformance.py`; each row of the acceptor is
checked against a live association (`tests/integration/test_conformance.py`, `test_conformance_rows.py`).

## 1. Overview

| SOP Class | as SCP | as SCU |
|---|---|---|
| Verification ({VERIFICATION}) | yes | yes |
| Storage (all, see 2.2) | yes | yes: what pipelines make |
| Storage Commitment Push Model ({STORAGE_COMMITMENT}) | yes (2.4) | yes: results accepted on either |
| Study Root Query/Retrieve FIND | no | yes, where a destination offers no commitment |

## 2. The acceptor (gateway, port {scp.port} by default)

### 2.1 Associations

| | |
|---|---|
| Application Context Name | {pdu.APPLICATION_CONTEXT} |
| Implementation Class UID | {IMPLEMENTATION_CLASS_UID} |
| Implementation Version Name | {IMPLEMENTATION_VERSION_NAME} |
| maximum length announced | {scp.max_pdu} by default (`gateway.scp.max_pdu`) |
| associations at once | {scp.max_associations} by default (`gateway.scp.max_associations`) |
| asynchronous operations | none: one operation at a time |
| user identity, types 1 and 2 | compared with `user` and `passcode` of a source; answered where asked for |
| deadline for the request, and for progress within a message | {STALL_S:.0f} s |
| deadline between messages | {scp.idle_timeout_s:.0f} s by default (`gateway.scp.idle_timeout_s`) |
| deadline for the peer to close | {LINGER_S} s |

Rejections (result/source/reason, PS3.8 9.3.4), each with the check that `clarion status` counts:

| A-ASSOCIATE-RJ | check |
|---|---|
{rejections}
| 1/1/2, 1/2/2 | `malformed-request`: another application context or protocol version |

### 2.2 Presentation contexts

| abstract syntax | transfer syntaxes |
|---|---|
| Verification | {plain} |
| Storage Commitment Push Model, SCU/SCP role selection accepted | {plain} |
| every SOP Class below {STORAGE_ROOT} | every one; of several in a context the first, which the sender prefers |
| the Storage SOP Classes below | as above |
| every private SOP Class | as above; while `gateway.scp.accept_private_sop_classes` is false, C-STORE gets 0x0122 |

| Storage SOP Classes outside that root |
|---|
{outside}

Every other abstract syntax gets result {pdu.ABSTRACT_SYNTAX_NOT_SUPPORTED}; one without a transfer syntax that is
taken, result {pdu.TRANSFER_SYNTAXES_NOT_SUPPORTED}. Data sets are kept byte for byte (Storage level 2), never decoded.

### 2.3 C-STORE statuses

| status | when |
|---|---|
{statuses}

### 2.4 Storage commitment

N-ACTION of a source gets 0x0000 when the request is journalled, 0x0110 when it names no transaction or no instances,
0x0213 for more than {MOST_INSTANCES} instances, 0x0124 from who may not store. The result goes to the destination in
the configuration that has the peer's AE title, on an association that proposes us as SCP by role selection: event type
1, or 2 with the reasons 0x0112 (no such instance) and 0x0119 (another SOP Class).

C-CANCEL on a storage context is ignored. A request that is none of these gets 0x0211.

## 3. The requestor (delivery)

Calling AE title `{scu.ae_title}` by default. Proposes Verification, Storage Commitment, Study Root FIND, and for each
object its SOP Class in the stored transfer syntax, then Explicit and Implicit VR Little Endian, into which it is
rewritten without loss where the peer takes nothing else; what is compressed or big endian then fails. Warnings 0xB000,
0xB006, 0xB007 count as success with a note.

DICOMweb (PS3.18), user agent: Store (10.5) of `application/dicom` in the stored transfer syntax, answers read as
`application/dicom+json`; Search (10.6) for instances of a series.

DICOMweb, origin server, where `gateway.stow` is configured (port {STOW_PORT} by default): Store of `application/dicom`
at `/CALLED-AE-TITLE/studies` and `/CALLED-AE-TITLE/studies/STUDY-UID`, up to {MOST_IN_A_REQUEST} instances a request,
statuses of 2.3 as failure reasons, answers in `application/dicom+json`.

## 4. Character sets

Text is decoded by Specific Character Set for grouping rules only; an undefined term counts as absent.

## 5. Security

Called and calling AE title, the peer's address and, where configured, the user identity are checked against lists.

TLS 1.2 and 1.3 as acceptor on a port of its own ({TLS_PORT} by default, `gateway.scp.tls`), with client certificates
where `client_ca` is given, and as requestor (`gateway.destinations[].tls`): BCP 195 RFC 8996 (PS3.15 B.12), suites
of TLS 1.2 `{CIPHERS["bcp195"]}`; with `profile: bcp195-modified` (B.13) `{CIPHERS["bcp195-modified"]}`. No older
version, no renegotiation, no compression.
"""


def main() -> None:
    """Write it."""
    TARGET.write_text(text())
    print(TARGET)


if __name__ == "__main__":
    main()
