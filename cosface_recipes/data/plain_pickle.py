"""Reads pickles of lists, bytes, numpy arrays and booleans, and nothing else.

Python's unpickler calls what the file names. This one is a stack machine over the opcodes that `pickletools`
describes: it imports nothing, calls nothing and sets no attribute, so that a file can only be
data. The handful of functions that stand for bytes and arrays in a pickle are recognised by name:

    _codecs.encode(text, "latin1")                             bytes, from protocol 2 of Python 3
    numpy's _reconstruct, with its state, and _frombuffer      an array of uint8 or bool
    numpy's scalar                                             a bool
"""

from __future__ import annotations

import codecs
import math
import mmap
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"u1": np.dtype(np.uint8), "b1": np.dtype(np.bool_)}
VALUES = {
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
}
CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(ValueError):
    """The pickle is damaged, or holds more than plain data."""


@dataclass(frozen=True)
class Global:
    """Something that the pickle refers to by name; it is never looked up."""

    module: str
    attribute: str

    def __str__(self) -> str:
        if not isinstance(self.module, str) or not isinstance(self.attribute, str):
            raise TypeError("a name is not text")
        return f"{self.module}.{self.attribute}"


@dataclass(eq=False)
class Array:
    """An array whose contents come with a later opcode."""

    value: np.ndarray | None = None


def read_pickle(path: str | Path) -> object:
    """The object in a file; numpy arrays in it are `Array`s, strings of Python 2 are bytes.

    Raises:
        PickleError: the file is no such pickle; the message says where.
    """
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise PickleError(f"The pickle {path} is empty.") from None
    with data:
        return _Machine(path, len(data)).run(data)


class _Machine:
    def __init__(self, path: str | Path, size: int):
        self.path = path
        self.to_encode = size  # bytes; a text of the file can be encoded many times, but needs to be only once
        self.stack: list = []
        self.marks: list[int] = []  # lengths of the stack
        self.memo: dict[int, object] = {}

    def run(self, data: mmap.mmap) -> object:
        position = 0
        try:
            for opcode, argument, at in _opcodes(data):
                position = at
                if opcode.name == "STOP":
                    (result,) = self.stack
                    return result
                self.step(opcode.name, argument)
        except PickleError:
            raise
        # What pickletools and these few lines raise on a damaged file.
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise PickleError(f"The pickle {self.path} is damaged near byte {position}: {error}") from error
        raise PickleError(f"The pickle {self.path} ends without a stop.")

    def step(self, name: str, argument) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            pass
        elif name in VALUES:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "STRING":
            stack.append(argument)
        elif name in ("BINSTRING", "SHORT_BINSTRING"):
            stack.append(argument.encode("latin-1"))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append([] if name == "EMPTY_LIST" else ())
        elif name in ("LIST", "TUPLE"):
            items = self.pop_to_mark()
            stack.append(items if name == "LIST" else tuple(items))
        elif name in TUPLES:
            items = tuple(stack[-TUPLES[name] :])
            del stack[-TUPLES[name] :]
            stack.append(items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.pop_to_mark()
            if not isinstance(stack[-1], list):
                raise ValueError("it appends to what is not a list")
            stack[-1].extend(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Global(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.reduce(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self.build(stack[-1], state)
        else:
            self.refuse(f"the opcode {name}")

    def pop_to_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def reduce(self, function: Global, arguments: tuple) -> object:
        name = str(function).replace("numpy.core.", "numpy._core.") if isinstance(function, Global) else "data"
        if name == "_codecs.encode" and arguments[1:] in (("latin1",), ("latin-1",)):
            self.to_encode -= len(arguments[0])
            if self.to_encode < 0:
                self.refuse("more text than it has bytes")
            return arguments[0].encode("latin-1")
        if name in ("__builtin__.bytes", "builtins.bytes") and arguments == ():
            return b""
        if name == "numpy.dtype":
            return self.dtype(arguments[0])
        if name == "numpy._core.multiarray._reconstruct":
            return Array()
        if name == "numpy._core.numeric._frombuffer":
            buffer, dtype, shape, order = arguments
            return Array(_array(buffer, dtype, shape, order == "F"))
        if name == "numpy._core.multiarray.scalar" and arguments[0] is DTYPES["b1"]:
            return arguments[1] == b"\1"
        return self.refuse(f"a call of {name}")

    def dtype(self, name: str | bytes) -> np.dtype:
        text = name.decode("latin-1") if isinstance(name, bytes) else name
        if not isinstance(text, str):
            raise TypeError("the name of a dtype is not text")
        return DTYPES[text] if text in DTYPES else self.refuse(f"an array of {text}")

    def build(self, target: object, state: object) -> None:
        if isinstance(target, Array) and isinstance(state, tuple):
            _, shape, dtype, fortran, data = state
            target.value = _array(data, dtype, shape, fortran is True)
        elif not isinstance(target, np.dtype):  # the state of these types says nothing new
            self.refuse(f"a state for {type(target).__name__}")

    def refuse(self, what: str):
        raise PickleError(
            f"The pickle {self.path} has {what}; only lists of bytes, uint8 and bool arrays are read."
        )


def _opcodes(data: mmap.mmap) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int]]:
    """Opcode, argument and position, as `pickletools.genops` gives them, but for the strings of protocol 0.

    Those are bytes in Python 2, and pickletools reads none beyond ASCII.
    """
    while True:
        at = data.tell()
        opcode = pickletools.code2op.get(data.read(1).decode("latin-1"))
        if opcode is None:
            raise ValueError("there is no opcode")
        argument = _quoted(data.readline()) if opcode.name == "STRING" else opcode.arg and opcode.arg.reader(data)
        yield opcode, argument, at


def _quoted(line: bytes) -> bytes:
    r"""What Python 2's repr of a byte string stands for.

    >>> _quoted(b"'\\xff'" + bytes([10]))
    b'\xff'
    """
    if len(line) < 3 or line[:1] not in (b"'", b'"') or line[-2:] != line[:1] + b"\n":
        raise ValueError("a string has no quotes")
    return codecs.escape_decode(line[1:-2])[0]


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    # No message shows the shape: what a pickle calls a shape can be longer, written out, than all memory.
    if not all(type(length) is int and length >= 0 for length in shape) or not isinstance(dtype, np.dtype):
        raise ValueError("an array has no shape or no dtype")
    if math.prod(shape) != len(data):
        raise ValueError(f"{len(data)} bytes are not what an array's shape says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
