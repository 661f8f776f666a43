"""Reads pickles of lists, bytes, numpy arrays and booleans, and nothing else.

Python's unpickler calls what the file names. `find_class` here finds nothing but stand-ins for the handful of
functions that stand for bytes and arrays in a pickle, so that a file can only be data:

    _codecs.encode(text, "latin1")                             bytes, from protocol 2 of Python 3
    numpy's _reconstruct, with its state, and _frombuffer      an array of uint8 or bool
    numpy's scalar                                             a bool

Such an allow-list bounds neither memory nor time. `pickle.Unpickler`, in C, allocates what a length or an index
into the memo says before it looks at the file; `pickle._Unpickler`, the same in Python, reads no more than the
file has, and keeps its memo in a dict. Its table of opcodes is an allow-list too: to hash the key of a dict can
take time exponential in the file, and an object of an extension (copyreg) can come without `find_class`.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

DTYPES = {"u1": np.dtype(np.uint8), "b1": np.dtype(np.bool_)}
OPCODES = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE"),
}
NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class PickleError(ValueError):
    """The pickle is damaged, or holds more than plain data."""


class Array:
    """An array whose contents come with a later opcode."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value


def read_pickle(path: str | Path) -> object:
    """The object in a file; numpy arrays in it are `Array`s, strings of Python 2 and bytearrays are bytes.

    Raises:
        PickleError: the file is no such pickle; the message says where.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise PickleError(f"The pickle {path} is empty.") from None
    with data:
        try:
            return _Unpickler(data).load()
        # What pickle raises on a damaged file, and numpy on a damaged array.
        except (
            *(pickle.UnpicklingError, struct.error, EOFError, ValueError, TypeError),
            *(LookupError, AttributeError, OverflowError),
        ) as error:
            reason = str(error) or "its end"
            raise PickleError(
                f"The pickle {path} has what cannot be read before byte {data.tell()} ({reason}); "
                "only lists of bytes, uint8 and bool arrays are read."
            ) from error


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"the opcode {NAMES.get(code, hex(code))}")


class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, data: mmap.mmap):
        super().__init__(data, encoding="bytes")
        self.to_encode = len(data)  # bytes; a text of the file can be encoded often, but needs to be only once

    def find_class(self, module: str, name: str) -> Callable[..., object] | None:
        full_name = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        stand_ins: dict[str, Callable[..., object] | None] = {
            "_codecs.encode": self.encode,
            "__builtin__.bytes": lambda: b"",
            "builtins.bytes": lambda: b"",
            "numpy.dtype": lambda name, *_: _dtype(name),
            "numpy.ndarray": None,  # an argument of _reconstruct
            "numpy._core.multiarray._reconstruct": lambda *_: Array(),
            "numpy._core.numeric._frombuffer": lambda *state: Array(_array(*state)),
            "numpy._core.multiarray.scalar": _scalar,
        }
        if full_name not in stand_ins:
            raise pickle.UnpicklingError(f"the name {full_name}")
        return stand_ins[full_name]

    def encode(self, text: str, encoding: str) -> bytes:
        self.to_encode -= len(text)
        if encoding not in ("latin1", "latin-1") or self.to_encode < 0:
            raise ValueError("another encoding than latin-1, or more text than the file has")
        return text.encode("latin-1")

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Array):
            _, shape, dtype, fortran, data = state
            target.value = _array(data, dtype, shape, "F" if fortran else "C")
        elif not isinstance(target, np.dtype):  # the state of these two says nothing new
            raise TypeError(f"a state for {type(target).__name__}")

    def load_frame(self) -> None:
        self.read(8)  # frames help who reads from a socket

    dispatch = _Opcodes(
        {code: pickle._Unpickler.dispatch[code] for code, name in NAMES.items() if name in OPCODES}
    )
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # a bytearray would be allocated first
    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.BUILD[0]] = load_build


def _dtype(name: str | bytes) -> np.dtype:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    if not isinstance(text, str) or text not in DTYPES:
        raise TypeError(f"an array of {text}" if isinstance(text, str) else "a dtype without a name")
    return DTYPES[text]


def _scalar(dtype: np.dtype, data: bytes) -> bool:
    if dtype is not DTYPES["b1"] or not isinstance(data, bytes):
        raise TypeError("a number of numpy that is no bool")
    return data == b"\1"


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    # A string would do as a dtype for numpy, and -1 as a length.
    if not isinstance(dtype, np.dtype) or any(length < 0 for length in shape):
        raise ValueError("an array without a dtype or a shape")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")
