"""A multipart body gives the same parts however its bytes come, and what is no such body is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.multipart import Multipart, MultipartError, parameters_of

BOUNDARY = "b0undary"
# What looks like a boundary and is none, and every byte that one is made of.
TRICKY = st.lists(
    st.sampled_from(
        [b"\r\n--b0undar", b"--b0undary", b"\r\n", b"\r", b"\n", b"-", b"\r\n-", b"\r\n--", b"x", b"\0\xff" * 9]
    )
).map(b"".join)


class Collected:
    def __init__(self) -> None:
        self.parts: list[tuple[dict[str, str], bytearray]] = []
        self.ended = 0

    def begin_part(self, headers: Mapping[str, str]) -> None:
        self.parts.append((dict(headers), bytearray()))

    def take(self, piece: memoryview) -> None:
        self.parts[-1][1].extend(piece)

    def end_part(self) -> None:
        self.ended += 1


def body(parts: list[bytes], headers: bytes = b"Content-Type: application/dicom\r\n") -> bytes:
    made = b"".join(b"--%b\r\n%b\r\n%b\r\n" % (BOUNDARY.encode(), headers, one) for one in parts)
    return b"preamble\r\n" + made + b"--%b--\r\nepilogue" % BOUNDARY.encode()


def read(data: bytes, cuts: list[int]) -> Collected:
    seen = Collected()
    reader = Multipart(BOUNDARY, seen)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        reader.feed(data[start:end])
    reader.close()
    return seen


@given(st.lists(TRICKY, max_size=4), st.lists(st.integers(0, 2**16), max_size=30))
def test_every_cut_of_a_body_gives_the_same_parts(parts: list[bytes], cuts: list[int]) -> None:
    """Bites: look for the boundary within a piece alone, and one that is cut in two becomes part of an image."""
    wanted = [one for one in parts if b"\r\n--" + BOUNDARY.encode() not in b"\r\n" + one + b"\r\n"]
    seen = read(body(wanted), cuts)
    assert [bytes(data) for _, data in seen.parts] == wanted
    assert all(headers == {"content-type": "application/dicom"} for headers, _ in seen.parts)
    assert seen.ended == len(wanted)


@given(st.lists(TRICKY, min_size=1, max_size=3), st.integers(1, 20))
def test_a_body_that_is_cut_is_said_to_be(parts: list[bytes], missing: int) -> None:
    wanted = [one for one in parts if b"\r\n--" + BOUNDARY.encode() not in b"\r\n" + one + b"\r\n"]
    whole = body(wanted)
    end = whole.rindex(b"--\r\nepilogue")
    with pytest.raises(MultipartError, match="before its last boundary"):
        read(whole[: max(0, end - missing + 1)], [])


def test_nothing_is_held_but_a_boundary() -> None:
    seen = Collected()
    reader = Multipart(BOUNDARY, seen)
    reader.feed(b"--b0undary\r\n\r\n")
    for _ in range(100):
        reader.feed(bytes(10_000))
        assert len(reader._buffer) <= len(BOUNDARY) + 4
    assert len(seen.parts[0][1]) > 990_000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"--b0undaryX\r\n\r\n", "followed by something else"),
        (b"--b0undary" + b" " * 300, "followed by something else"),
        (b"--b0undary\r\n" + b"x" * 20_000, "longer than 16 KiB"),
        (b"--b0undary\r\n" + b"a: b\r\n" * 5_000 + b"\r\n", "longer than 16 KiB"),
        (b"", "before its last boundary"),
    ],
)
def test_what_is_no_multipart_body_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(MultipartError, match=said):
        read(data, [])


@pytest.mark.parametrize("boundary", ["", "a" * 71, "b\r\nX", 'a"b', "trailing "])
def test_a_boundary_has_the_characters_it_may_have(boundary: str) -> None:
    with pytest.raises(MultipartError, match="boundary"):
        Multipart(boundary, Collected())


def test_the_type_of_a_request() -> None:
    kind, parameters = parameters_of('Multipart/Related; type="application/dicom"; Boundary="a b"; start=x')
    assert (kind, parameters["type"], parameters["boundary"]) == ("multipart/related", "application/dicom", "a b")
    assert parameters_of("") == ("", {})
