"""The pickle in a file written by `torch.save`, read without running anything.

Python's unpickler, torch's `weights_only` one included, allocates what the pickle says: a memo of
2**32 places, a tensor of any size. This one knows the few classes and functions that tensors are
made with, builds descriptions of them, and never has more than the pickle's own bytes describe.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_BYTES = 16 << 20
"""Largest pickle: that of Llama 3.1 405B has 0.2 MB."""

MAX_STEPS = 400_000
"""A tensor takes about 35: Llama 3.1 405B has 1,138 tensors in all its files."""

DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
}
"""Name of a typed storage -> its elements' type."""

_SIZES = {
    "complex128": 16,
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    "float8_e8m0fnu": 1,
}
_BYTES = "bytes"

_CONTAINERS = ("collections.OrderedDict", "builtins.dict", "__builtin__.dict")
_REBUILD = "torch._utils._rebuild_"
_PARAMETERS = tuple(f"{_REBUILD}parameter{end}" for end in ("", "_with_state"))
_TENSORS = tuple(f"{_REBUILD}tensor{end}" for end in ("", "_v2", "_v3"))

# What torch.save writes for other things than plain tensors; nothing of it can do harm.
_HARMLESS = (
    *(f"{_REBUILD}{kind}" for kind in ("qtensor", "sparse_tensor", "sparse_csr_tensor")),
    *(f"{_REBUILD}{kind}" for kind in ("meta_tensor_no_storage", "nested_tensor")),
    "torch.serialization._get_layout",
    "torch.Size",
    "torch.device",
    "_codecs.encode",
    "__builtin__.set",
    "builtins.set",
    "collections.Counter",
)


class PickleError(ValueError):
    """The pickle is damaged, or describes something impossible."""


class ForeignError(ValueError):
    """The pickle asks for the names in `args`, which could run any code."""


@dataclass(frozen=True)
class Storage:
    """`count` elements of the type `dtype` ("bytes" if untyped) in the record `key`."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.count * _SIZES.get(self.dtype, 1)


@dataclass(frozen=True)
class Described:
    """A tensor: its elements are in `storage`, the first at element `offset`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    plain: bool

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _SIZES[self.dtype]


@dataclass(frozen=True)
class Opaque:
    """Something else, by the name of what makes it."""

    name: str


_MARK = Opaque("a mark")


def read_pickle(content: bytes) -> Any:
    """Return what the pickle `content` holds: dicts, lists, tuples, plain values, `Described`
    tensors and `Opaque` things.

    Raises `ForeignError` if it names something that could run code, `PickleError` if it is damaged.
    """
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(_opcodes(content)):
            if step == MAX_STEPS:
                raise PickleError(f"it has more than {MAX_STEPS:,} steps")
            machine.run(opcode.name, argument)
        result = machine.stack.pop()
    except (IndexError, KeyError, TypeError, AttributeError):
        raise PickleError("its steps do not fit together") from None
    if machine.foreign:
        raise ForeignError(*sorted(machine.foreign))
    return result


def _opcodes(content: bytes) -> Iterator[tuple[Any, Any, Any]]:
    try:
        yield from pickletools.genops(content)
    except PickleError:
        raise
    except Exception as error:  # genops raises ValueError, OverflowError, UnicodeDecodeError ...
        raise PickleError(f"it is cut off or damaged ({type(error).__name__})") from None


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.foreign: set[str] = set()

    def run(self, name: str, argument: Any) -> None:
        """Do one step."""
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("PROTO", "FRAME", "STOP"):
            return
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self._global(argument.replace(" ", ".", 1)))
        else:
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Do a step that takes values from the stack."""
        stack = self.stack
        if name == "STACK_GLOBAL":
            last, first = stack.pop(), stack.pop()
            stack.append(self._global(f"{_text(first)}.{_text(last)}"))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            values, maker = stack.pop(), stack.pop()
            stack.append(_made(maker, values))
        elif name == "BUILD":  # sets attributes, which no plain tensor or dict needs
            stack.pop()
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "DICT"):
            values = self._pop_mark()
            stack.append(_dict(values) if name == "DICT" else _SEQUENCES[name](values))
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if not isinstance(stack[-1], Opaque):
                stack[-1].update(_dict(values))
        elif name in ("APPEND", "APPENDS"):
            values = self._pop_mark() if name == "APPENDS" else [stack.pop()]
            if not isinstance(stack[-1], Opaque):
                stack[-1].extend(values)
        else:
            raise PickleError(f"it has the step {name}, which torch.save does not write")

    def _pop_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _global(self, name: str) -> Opaque:
        last = name.removeprefix("torch.")
        storage = name.startswith("torch.") and last.removesuffix("Storage") in DTYPES
        known = (*_CONTAINERS, *_HARMLESS, *_TENSORS, *_PARAMETERS, "torch.storage.UntypedStorage")
        plain = last in _SIZES or (last.isidentifier() and last.startswith(("per_", "Q")))
        if not (storage or name in known or (name.startswith("torch.") and plain)):
            self.foreign.add(name[:200])
        return Opaque(name)


_PUSHES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "FLOAT", "BINFLOAT"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: _MARK,
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"TUPLE": tuple, "LIST": list}


def _dict(values: list[Any]) -> dict[Any, Any]:
    keys = values[::2]
    if len(values) % 2:
        raise PickleError("a key has no value")
    # A nested tuple would be hashed again at each level, which takes for ever.
    if not all(isinstance(key, str | int | float | bool | None) for key in keys):
        raise PickleError("a key is neither a text nor a number")
    return dict(zip(keys, values[1::2], strict=True))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PickleError("a name is not a text")
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise PickleError("a size is not a count")
    return value


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > 32:
        raise PickleError("a shape is not a few counts")
    return tuple(map(_count, value))


def _storage(value: Any) -> Storage:
    """Return the storage with the persistent id `value`: ("storage", class, key, device, count)."""
    if not isinstance(value, tuple) or len(value) < 5 or value[0] != "storage":
        raise PickleError("a storage is not described as torch.save does")
    kind = value[1].name.removeprefix("torch.")
    dtype = DTYPES.get(kind.removesuffix("Storage"), _BYTES)
    return Storage(_text(value[2]), dtype, _count(value[4]))


def _made(maker: Any, values: Any) -> Any:
    if not isinstance(maker, Opaque) or not isinstance(values, tuple):
        raise PickleError("it calls something that is not a function")
    if maker.name in _CONTAINERS:
        # Python 2 wrote OrderedDict([[key, value], ...]).
        return _dict([item for pair in values[0] for item in pair] if values else [])
    if maker.name == "torch.Size":
        return _counts(values[0])
    if maker.name in _PARAMETERS:
        return values[0]
    return _tensor(maker.name, values) if maker.name in _TENSORS else Opaque(maker.name)


def _tensor(maker: str, values: tuple[Any, ...]) -> Described:
    storage, offset, shape, strides = values[0], _count(values[1]), values[2], values[3]
    if not isinstance(storage, Storage):
        raise PickleError("a tensor has no storage")
    third = maker.endswith("_v3")
    dtype = values[6].name.removeprefix("torch.") if third else storage.dtype
    if dtype not in _SIZES:
        raise PickleError("a tensor has no type")
    # The last argument has marks such as "conj": values to be read otherwise than stored.
    plain = not any(values[7 if third else 6 :])
    found = Described(storage, dtype, offset, _counts(shape), _counts(strides), plain)
    if len(found.shape) != len(found.strides):
        raise PickleError("a tensor has more strides than dimensions")
    return found
