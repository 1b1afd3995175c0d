"""Plain data comes out of a pickle; what would run anything is refused before it is looked up."""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivium.data.unpickling import read_pickle
from trivium.errors import TriviumError


def write(path: Path, value: Any, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_and_arrays(protocol: int, tmp_path: Path) -> None:
    value = {
        b"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3], "name": b"a batch",
        "more": (None, True), "set": {1, 2}, "real": np.array([0.5]), "texts": np.array(["a", "bc"]),
        "imdb": np.array([{"question": "why"}, {"question": "where"}], dtype=object),
    }  # fmt: skip
    found = read_pickle(write(tmp_path / "a", value, protocol))
    np.testing.assert_array_equal(found[b"data"], value[b"data"])
    np.testing.assert_array_equal(found["texts"], value["texts"])
    assert [found[name] for name in ("labels", "name", "more", "set")] == [[1, 2, 3], b"a batch", (None, True), {1, 2}]
    assert found["imdb"][1] == {"question": "where"}


def test_a_batch_that_python_2_wrote(tmp_path: Path) -> None:
    """Its str come as bytes. The opcodes are those of Python 2's cPickle, protocol 2."""
    data = b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x06K\x09eU\x04nameq\x04U\x03\xffabu."
    pickletools.dis(data, out=(tmp_path / "dis").open("w"))
    (tmp_path / "a").write_bytes(data)
    assert read_pickle(tmp_path / "a") == {b"labels": [6, 9], b"name": b"\xffab"}


class Asks:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced: tuple[Any, ...] = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [eval, getattr, print, np.load, np.fromfile, open, __import__])
def test_what_calls_anything_else_is_refused(function: Any, protocol: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"data": Asks(function, "1")}, protocol)
    with pytest.raises(TriviumError, match="a is no file of plain data and is not opened: it asks for"):
        read_pickle(path)


def test_inside_an_array_of_objects_as_well(tmp_path: Path) -> None:
    path = write(tmp_path / "a", np.array([Asks(eval, "1")], dtype=object), 4)
    with pytest.raises(TriviumError, match=r"it asks for builtins.eval"):
        read_pickle(path)


MADE, MAPPED = (np.zeros(1).__reduce_ex__(protocol)[0] for protocol in (4, 5))  # numpy's functions for either


def with_state(state: tuple[Any, ...]) -> Asks:
    asks = Asks(MADE, np.ndarray, (0,), b"b")
    asks.reduced += (state,)
    return asks


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Asks(np.ndarray, (1,), np.dtype("u1"), b"A"), "a is damaged .*not callable"),
        (np.zeros(1, [("a", "i8")]), "it asks for an array of V8"),
        (with_state((1, (3,), np.dtype("O"), False, [1])), "an array of 3 objects has 1"),
        (Asks(MAPPED, np.zeros(1, "u1"), np.dtype("u1"), (1,), "C"), "an array looks at the memory of another"),
        (Asks(MAPPED, b"A" * 8, np.dtype("O"), (1,), "C"), "a is damaged .*OBJECT"),
        (with_state((1, (1,), np.dtype("O"), False, b"A")), "a is damaged .*list"),
    ],
    ids=["a call of ndarray", "fields", "too few objects", "another's memory", "pointers", "more pointers"],
)
def test_no_array_reaches_beyond_its_own_values(value: Any, why: str, tmp_path: Path) -> None:
    """Reading such a one would read, or release, memory that is not its own."""
    with pytest.raises(TriviumError, match=why):
        read_pickle(write(tmp_path / "a", value, 4))


@pytest.mark.parametrize("protocol", range(6))
def test_an_array_travels_on_to_other_processes(protocol: int, tmp_path: Path) -> None:
    found = read_pickle(write(tmp_path / "a", np.arange(6, dtype=">i2").reshape(2, 3, order="F"), protocol))
    again = pickle.loads(pickle.dumps(found, protocol))
    assert type(again) is np.ndarray
    np.testing.assert_array_equal(again, [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"no pickle", b"\x80\x02}q\x01(U\xff", b"\x80\x05N", b"\x80\x02c__main__\nx\n."]
)
def test_damage_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(TriviumError, match=r"a is (damaged|no file of plain data)"):
        read_pickle(tmp_path / "a")
    with pytest.raises(TriviumError, match="cannot be read"):
        read_pickle(tmp_path / "none")


def test_the_codec_of_bytes_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    with pytest.raises(TriviumError, match="the codec rot13"):
        read_pickle(tmp_path / "a")
