"""Data that its owners publish as pickles (CIFAR's batches), read without running what a pickle may ask for.

A pickle names the functions it wants called. Those that make a numpy array of plain numbers or text are admitted here,
with what Python itself makes of literals; any other name is refused before it is looked up. What a pickle says of an
array's memory is not taken on trust either: numpy would follow it to anywhere.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from trivium.errors import TriviumError

DTYPES = re.compile(r"\?|[biufcSUO][0-9]*")  # numbers, text and objects; no fields


class _Dtype:
    """In place of numpy's, which believes what a pickle says of its fields: they may lie anywhere in memory."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        text = name.decode() if isinstance(name, bytes) else name
        if not DTYPES.fullmatch(text):
            raise pickle.UnpicklingError(f"it asks for an array of {text}")
        self.plain = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Of the state the order of the bytes counts; its other parts repeat the name, or are of fields."""
        self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that does not take its state unseen. It is pickled, to a worker say, as any array."""

    def __setstate__(self, state: Any, /) -> None:
        version, shape, dtype, order, data = state
        if dtype.plain.hasobject and len(data) != math.prod(shape):  # numpy would read on behind the list
            raise pickle.UnpicklingError(f"an array of {math.prod(shape)} objects has {len(data)}")
        super().__setstate__((version, shape, dtype.plain, order, data))

    def __reduce__(self) -> str | tuple[Any, ...]:
        return np.asarray(self).__reduce__()


def _bytes_of(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as protocol 2 writes bytes with it; other codecs may do other things."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding}")
    return text.encode("latin1")


def _reconstruct(*_: Any) -> np.ndarray:
    """As the protocols before 5 begin an array; its state follows."""
    return _Array(0, np.uint8)


def _frombuffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    """As protocol 5 writes an array; numpy makes no objects out of bytes."""
    if not isinstance(data, bytes | bytearray):  # another array might be given other memory while this one looks at it
        raise pickle.UnpicklingError("an array looks at the memory of another")
    return np.frombuffer(data, dtype.plain).reshape(shape, order=order)


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): "ndarray",  # what `_reconstruct` is given; a call of it would make an array of any memory
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes_of,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, bytearray, complex)},
    **{("__builtin__", kind.__name__): kind for kind in (set, frozenset, bytearray, complex)},  # of Python 2
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ADMITTED[module, name]


def read_pickle(path: Path) -> Any:
    """The numbers, texts, lists, dicts and arrays of a pickle; what Python 2 wrote as str comes as bytes.

    Raises:
        TriviumError: it asks for anything else, is damaged, or cannot be read.
    """
    try:
        file = io.BytesIO(path.read_bytes())
        found = _Restricted(file, encoding="bytes").load()
        if file.read(1):
            raise pickle.UnpicklingError("it goes on after its end")
        return found
    except OSError as error:
        raise TriviumError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except pickle.UnpicklingError as error:
        raise TriviumError(f"{path} is no file of plain data and is not opened: {error}; fetch it again") from None
    except Exception as error:  # over hostile bytes its opcodes raise nearly every type there is
        raise TriviumError(f"{path} is damaged ({error!r}): fetch it again from its owners") from None
