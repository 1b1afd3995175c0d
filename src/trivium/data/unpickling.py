"""Data that its owners publish as pickles (CIFAR's batches), read without running what a pickle may ask for.

A pickle names the functions it wants called. Those that make a numpy array of plain numbers or text are admitted here,
with what Python itself makes of literals; any other name is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trivium.errors import TriviumError

try:  # the function that rebuilds a pickled array has moved
    from numpy._core.multiarray import _reconstruct
except ImportError:
    from numpy.core.multiarray import _reconstruct  # type: ignore[no-redef]


def _bytes_of(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as protocol 2 writes bytes with it; other codecs may do other things."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding}")
    return text.encode("latin1")


def _frombuffer(data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any) -> np.ndarray:
    """As protocol 5 writes an array; numpy makes no objects out of bytes."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)


ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
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
