"""The client of a DICOMweb service: STOW-RS with a result for each instance, QIDO-RS as proof (PS3.18 10.5, 10.6)."""

from __future__ import annotations

import json
import secrets
import threading
from typing import TYPE_CHECKING, Any, Self

import httpx

from clarion.dicom import part10
from clarion.errors import PeerRefusedError, PeerUnavailableError
from gateway.pool import UnreachedError
from gateway.statuses import NO_ANSWER, UNSENDABLE
from gateway.wire.secure import requestor_context

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clarion.model import Destination, ResultInstance
    from clarion.ports import ObjectStore
    from gateway.scu import Timeouts

_JSON = "application/dicom+json"
_FAILED, _STORED = "00081198", "00081199"
_FAILURE_REASON, _WARNING_REASON = "00081197", "00081196"
_REFERENCED_INSTANCE, _SOP_INSTANCE = "00081155", "00080018"
_SUCCESS = 0
# What an answer may be: ten instances take a few kilobytes, a page of a query a few hundred.
_MOST_BYTES = 4 * 2**20
_PAGE = 1000
_MOST_PAGES = 100
_UNAUTHORISED = frozenset((401, 403))
_AGAIN = frozenset((408, 425, 429))
# What stands before a service says so when there is none behind it.
_AWAY = frozenset((502, 503, 504))
_PER_INSTANCE = frozenset((200, 202, 409))
# What is wrong is the place, and not an instance.
_NOT_A_SERVICE = frozenset((404, 405, 406, 410, 415, 426))
# A body may take so long for each of its bytes; an answer the deadline, twice.
_SLOWEST_BYTES_S = 2048
_PIECE_BYTES = 256 * 1024


class WebPeer:
    """A DICOMweb service as the sender sees it; use it in a `with` block. Every call has a deadline."""

    def __init__(self, destination: Destination, timeouts: Timeouts) -> None:
        if destination.web is None:
            raise ValueError(f"{destination.name} is no DICOMweb service")
        access = destination.web
        self._name = destination.name
        self._patience_s = timeouts.connect_s + 2 * timeouts.dimse_s
        self._url = access.url
        headers = {"Authorization": f"Bearer {access.secret}"} if access.secret and access.user is None else {}
        self._client = httpx.Client(
            auth=(access.user, access.secret or "") if access.user is not None else None,
            headers=headers,
            timeout=httpx.Timeout(timeouts.dimse_s, connect=timeouts.connect_s),
            verify=requestor_context(destination.tls) if destination.tls is not None else True,
            follow_redirects=False,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        """Use the service."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._client.close()

    def store(self, instances: Sequence[ResultInstance], store: ObjectStore) -> dict[str, tuple[int, str]]:
        """Send instances in one request; give for each SOP Instance UID its status and what was said.

        Objects are read one after another while they are sent. Raises PeerUnavailableError, PeerRefusedError,
        MissingObjectError, StoreUnavailableError.
        """
        boundary = secrets.token_hex(16)
        size = sum(len(one) for instance in instances for one in _part(instance, b"", boundary))
        size += sum(one.object.size_bytes for one in instances) + len(_end(boundary))
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(size),
            "Accept": _JSON,
        }
        status, body = self._ask("POST", "/studies", headers, _body(instances, store, boundary), size=size)
        if status in _NOT_A_SERVICE or httpx.codes.is_redirect(status):
            raise PeerRefusedError(f"{self._name}: HTTP {status}; does {self._url} take STOW-RS?")
        if status not in _PER_INSTANCE and len(instances) > 1:
            # Of too many bytes, or for the sake of one of them: each for itself tells.
            return {uid: answer for one in instances for uid, answer in self.store([one], store).items()}
        if status not in _PER_INSTANCE:
            return {one.sop_instance_uid: (UNSENDABLE, f"HTTP {status}") for one in instances}
        answer = body if isinstance(body, dict) else {}
        stored, failed = _by_instance(answer, _STORED, _WARNING_REASON), _by_instance(answer, _FAILED, _FAILURE_REASON)
        # 200 says that everything is stored, also where the answer lists nothing.
        rest = _SUCCESS if status == httpx.codes.OK else NO_ANSWER
        found = {}
        for one in instances:
            code = failed.get(one.sop_instance_uid, stored.get(one.sop_instance_uid, rest))
            found[str(one.sop_instance_uid)] = code, f"HTTP {status}" if code == NO_ANSWER else ""
        return found

    def find(self, study_uid: str, series_uid: str) -> set[str]:
        """Ask which SOP Instance UIDs of a series the service has."""
        found: set[str] = set()
        for page in range(_MOST_PAGES):
            query = f"?includefield={_SOP_INSTANCE}&limit={_PAGE}&offset={page * _PAGE}"
            path = f"/studies/{study_uid}/series/{series_uid}/instances{query}"
            status, body = self._ask("GET", path, {"Accept": _JSON})
            if status in {204, 404}:
                return found
            if status != httpx.codes.OK or not isinstance(body, list):
                raise PeerUnavailableError(f"{self._name}: the query was answered HTTP {status}")
            found |= {uid for one in body if (uid := _value(one, _SOP_INSTANCE))}
            if len(body) < _PAGE:
                return found
        raise PeerUnavailableError(f"{self._name}: the series has more than {_PAGE * _MOST_PAGES} instances")

    def look(self) -> None:
        """Ask for one study, whichever, to see that the service is there and lets us in. Raises as the others."""
        status, _ = self._ask("GET", "/studies?limit=1", {"Accept": _JSON})
        if status not in {200, 204}:
            raise PeerRefusedError(f"{self._name}: a query is answered HTTP {status}; is {self._url} its root?")

    def _ask(
        self, method: str, path: str, headers: dict[str, str], content: Iterator[bytes] | None = None, size: int = 0
    ) -> tuple[int, Any]:
        """Give the status and the JSON body of an answer; None for another body.

        The deadlines of httpx are of each read and write: a service that drips is cut off at one for the whole.
        """
        cut_off = threading.Timer(self._patience_s + size / _SLOWEST_BYTES_S, self._client.close)
        cut_off.daemon = True
        cut_off.start()
        try:
            with self._client.stream(method, self._url + path, headers=headers, content=content) as answer:
                body = bytearray()
                for piece in answer.iter_bytes():
                    body += piece
                    if len(body) > _MOST_BYTES:
                        raise PeerUnavailableError(f"{self._name}: an answer of more than {_MOST_BYTES} bytes")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachedError(f"{self._name}: {self._url} cannot be reached ({error})") from error
        except httpx.TimeoutException as error:
            raise PeerUnavailableError(f"{self._name}: {self._url} does not answer") from error
        except httpx.HTTPError as error:
            raise PeerUnavailableError(f"{self._name}: {self._url} cannot be reached ({error})") from error
        finally:
            cut_off.cancel()
        if answer.status_code in _UNAUTHORISED:
            raise PeerRefusedError(f"{self._name}: HTTP {answer.status_code}; is the user or token right?")
        if answer.status_code in _AWAY:
            raise UnreachedError(f"{self._name}: HTTP {answer.status_code}; is the service running there?")
        if answer.status_code in _AGAIN or answer.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
            raise PeerUnavailableError(f"{self._name}: HTTP {answer.status_code}")
        return answer.status_code, _json_of(bytes(body))


def _json_of(body: bytes) -> Any:  # noqa: ANN401  whatever the peer says
    try:
        return json.loads(body)
    except ValueError:
        return None


def _body(instances: Sequence[ResultInstance], store: ObjectStore, boundary: str) -> Iterator[bytes]:
    for one in instances:
        # In pieces: what the connection has not taken yet is copied with each of its writes.
        for part in _part(one, store.read(one.object), boundary):
            for at in range(0, len(part), _PIECE_BYTES):
                yield part[at : at + _PIECE_BYTES]
    yield _end(boundary)


def _part(instance: ResultInstance, data: bytes, boundary: str) -> tuple[bytes, ...]:
    """Make one part: its head, the Part 10 head of the file, the data set."""
    head = part10(
        b"",
        sop_class_uid=instance.sop_class_uid,
        sop_instance_uid=instance.sop_instance_uid,
        transfer_syntax_uid=instance.transfer_syntax_uid,
    )
    return f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode(), head, data, b"\r\n"


def _end(boundary: str) -> bytes:
    return f"--{boundary}--\r\n".encode()


def _by_instance(answer: dict[str, Any], sequence: str, reason: str) -> dict[str, int]:
    """Read the statuses that a sequence of the answer gives its instances (PS3.18 10.5.3)."""
    found = {}
    items = answer.get(sequence)
    for item in (items.get("Value") or []) if isinstance(items, dict) else []:
        uid, code = _value(item, _REFERENCED_INSTANCE), _value(item, reason)
        if isinstance(uid, str):
            found[uid] = code if isinstance(code, int) else (NO_ANSWER if reason == _FAILURE_REASON else _SUCCESS)
    return found


def _value(item: Any, tag: str) -> Any:  # noqa: ANN401  whatever the peer says
    """Give the first value of an attribute, None without one."""
    attribute = item.get(tag) if isinstance(item, dict) else None
    values = attribute.get("Value") if isinstance(attribute, dict) else None
    return values[0] if isinstance(values, list) and values else None
