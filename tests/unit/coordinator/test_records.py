"""A stream cut at the ends of its records: nothing lost, nothing halved, little held back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_coordinator.api.inference.relay import HELD_BACK_BYTES, Records

SEPARATORS = st.sampled_from([b"\n", b"\n\n"])
TEXTS = st.lists(st.sampled_from([b"a", b"{}", b'{"x":"y"}', b"data: 1", b""]), max_size=8)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(SEPARATORS, st.binary(max_size=40) | TEXTS.map(b"\n\n".join), st.lists(st.integers(0, 99)))
def test_everything_passes_once_and_in_order(
    separator: bytes, data: bytes, cuts: list[int]
) -> None:
    records = Records(separator)
    passed = b"".join(records.feed(chunk) for chunk in split(data, cuts))
    assert passed + records.rest == data


def ends_of(separator: bytes) -> tuple[bytes, ...]:
    return (b"\n",) if separator == b"\n" else (b"\n\n", b"\n\r\n", b"\r\r")


@pytest.mark.spec("PROXY-41")
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\n\n", b"\r\r"])
@given(st.lists(st.sampled_from([b"data: 1", b"event: a"]), min_size=1), st.integers(1, 9))
def test_an_event_passes_with_its_empty_line_however_lines_end(
    end: bytes, texts: list[bytes], size: int
) -> None:
    records = Records(b"\n\n")
    for text in texts:
        whole = text + end
        passed = [records.feed(whole[at : at + size]) for at in range(0, len(whole), size)]
        assert b"".join(passed) == whole
        assert b"".join(passed[:-1]) == b""
    assert (records.count, records.rest) == (len(texts), b"")


@given(SEPARATORS, st.binary(max_size=40) | TEXTS.map(b"\n\n".join), st.lists(st.integers(0, 99)))
def test_only_whole_records_pass(separator: bytes, data: bytes, cuts: list[int]) -> None:
    records = Records(separator)
    for chunk in split(data, cuts):
        passed = records.feed(chunk)
        assert passed == b"" or passed.endswith(ends_of(separator))
        assert separator not in records.rest


@given(
    SEPARATORS, st.lists(st.sampled_from([b"a", b"{}", b"data: 1"])), st.lists(st.integers(0, 99))
)
def test_every_record_counts_once_however_it_arrives(
    separator: bytes, texts: list[bytes], cuts: list[int]
) -> None:
    records = Records(separator)
    data = b"".join(text + separator for text in texts)
    for chunk in split(data, cuts):
        records.feed(chunk)
    assert records.count == len(texts)
    assert records.rest == b""


def test_the_last_records_are_remembered() -> None:
    records = Records(b"\n")
    records.feed(b"1\n2\n3")
    assert (records.last, records.rest) == (b"1\n2\n", b"3")
    records.feed(b"")
    assert records.last == b"1\n2\n"
    assert records.feed(b"\n4") == b"3\n"
    assert records.last == b"3\n"


def test_a_chunk_of_whole_records_passes_as_it_is() -> None:
    chunk = b"1\n2\n"
    assert Records(b"\n").feed(chunk) is chunk


@pytest.mark.parametrize("separator", [b"\n", b"\n\n"])
def test_a_record_too_long_to_hold_passes_in_pieces(separator: bytes) -> None:
    records = Records(separator)
    piece = b"x" * (HELD_BACK_BYTES // 4)
    passed = b""
    for _ in range(20):
        passed += records.feed(piece)
        assert len(records.rest) <= HELD_BACK_BYTES
    assert len(passed) >= 4 * HELD_BACK_BYTES
    assert records.count > 0  # the answer has begun, though no record has ended
    passed += records.feed(separator + b"y")
    assert passed == piece * 20 + separator
    assert records.rest == b"y"


def test_what_precedes_a_long_record_does_not_wait_for_it() -> None:
    records = Records(b"\n")
    assert records.feed(b"1\n" + b"x" * 100) == b"1\n"
