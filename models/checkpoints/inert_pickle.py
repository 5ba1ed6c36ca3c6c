"""A pickle reader that runs nothing: it builds plain data, and describes everything else.

A `.pt` file holds a pickle, and a pickle is a program: Python's reader imports what it names and calls it. This one is
Python's own reader in Python (`pickle._Unpickler`) with those opcodes replaced or refused:

- plain data (numbers, text, bytes, lists, tuples, dicts) is built as such;
- a name (`models.yolo DetectionModel`) becomes a `Name`, two strings; nothing is imported;
- an object of a class becomes a `Record`: the class's name, its arguments and its state; so does a set;
- a tensor becomes a `TensorRecord`: a checked description of where its numbers lie in the archive, read later if
  wanted;
- a call (`REDUCE`) of anything but a short list of known, side-effect-free builders is refused, by name; so are
  names from modules that a model has no business with (`os`, `subprocess`, `builtins.eval`, `torch.load`, ...), even
  if they are not called.

Bounds: size of the pickle, number of reads, size of integers, number of dictionary keys that are not text. The
structures may be cyclic and deep; whoever walks them must bound the walk.

The reader in C (`pickle.Unpickler`) would be faster and can't be bounded from outside: nine bytes that put a value at
memo index 300,000,000 make it allocate 4.6 GB, and a dictionary of 20,000 integer keys whose hashes collide (260 kB)
takes it five seconds, a hundred times that for ten times as many.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any

from core.errors import CheckpointError
from models.checkpoints.inert_records import (
    MAX_NAME_LENGTH,
    STORAGE_DTYPES,
    Name,
    Record,
    StorageRecord,
    call_builder,
    check_key,
    check_name,
)

MAX_PICKLE_BYTES = 64 * 2**20
MAX_READS = (
    2_000_000  # an opcode takes one to three; the largest file tried (unstripped YOLOv9-t) takes 0.6 million
)
MAX_INTEGER_BYTES = 16
MAX_OTHER_KEYS_IN_ALL = 40_000
MAX_LINE = 512
# what torch writes (protocols 2 to 5); none of them imports, and the text forms of protocol 0 are not among them
_OPCODES = frozenset(
    b"\x80\x95.(012N\x88\x89JKMG\x8aX\x8c\x8dBC\x8e)]}\x8ft\x85\x86\x87ldaesu\x90\x91qr\x94hjc\x93R\x81\x92bQ"
)
_DAMAGES = (
    pickle.UnpicklingError, AttributeError, EOFError, LookupError, OverflowError, TypeError, ValueError, struct.error,
)  # fmt: skip


def read_pickle(data: bytes) -> Any:
    """Interpret one pickle without importing or running anything.

    Args:
        data: The pickle, at most 64 MiB, of at most 2,000,000 opcodes and arguments.

    Returns:
        Plain data, with `Name`, `Record` and `TensorRecord` where the pickle has classes, objects and tensors.

    Raises:
        CheckpointError: If the pickle is damaged, too large, uses an opcode that torch does not write, or asks for a
            call or a name that is refused.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"The pickle has {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    source = _Source(data)
    try:
        return _InertUnpickler(source).load()
    except CheckpointError:
        raise
    except _DAMAGES as error:
        raise CheckpointError(f"Damaged pickle at byte {source.position}: {type(error).__name__}") from error


class _Source:
    """The bytes of a pickle as a file; reading beyond the end, and too many reads, are refused."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.num_reads = 0

    def read(self, count: int) -> bytes:
        self.num_reads += 1
        if self.num_reads > MAX_READS:
            raise CheckpointError(f"The pickle has more than {MAX_READS} opcodes and arguments; refused")
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise CheckpointError(
                f"Truncated pickle: byte {self.position} is wanted, {len(self.data)} are there"
            )
        return self.data[start : self.position]

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise CheckpointError(f"Damaged pickle: a name at byte {self.position} does not end")
        return self.read(end + 1 - self.position)


class _Handlers(dict[int, Callable[..., None]]):
    """Opcode -> method of the reader."""

    def __missing__(self, opcode: int) -> Callable[..., None]:
        raise CheckpointError(f"Refused pickle opcode {bytes([opcode])!r}; torch does not write it")


class _InertUnpickler(pickle._Unpickler):
    dispatch = _Handlers(
        (opcode, handler) for opcode, handler in pickle._Unpickler.dispatch.items() if opcode in _OPCODES
    )

    stack: list[Any]  # these four are the base class's
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, source: _Source) -> None:
        super().__init__(source)
        self.copied = 0
        self.other_keys = 0

    def find_class(self, module: str, name: str) -> Any:
        return check_name(module, name)

    def persistent_load(self, identity: Any) -> StorageRecord:
        """A tensor's storage, from ('storage', Name of the storage class, key, device, numel)."""
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise CheckpointError("Damaged pickle: a persistent id that is not a tensor's storage")
        _, kind, key, _, numel = identity
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
        if dtype is None:
            raise CheckpointError(
                f"Storage class {str(kind)[:80]} is not supported; expected one of torch.{', '.join(STORAGE_DTYPES)}"
            )
        is_key = type(key) is str and len(key) <= MAX_NAME_LENGTH and key.isalnum()
        if not is_key or type(numel) is not int or numel < 0:
            raise CheckpointError("Damaged pickle: a storage without a key or a size")
        return StorageRecord(dtype, key, numel)

    def load_frame(self) -> None:
        self.read(8)  # the whole pickle is in memory

    dispatch[pickle.FRAME[0]] = load_frame

    def load_long1(self) -> None:
        size = self.read(1)[0]
        if size > MAX_INTEGER_BYTES:
            raise CheckpointError(f"An integer of {size} bytes; at most {MAX_INTEGER_BYTES} are read")
        self.append(int.from_bytes(self.read(size), "little", signed=True))

    dispatch[pickle.LONG1[0]] = load_long1

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if type(arguments) is tuple:
            self.copied += sum(len(item) for item in arguments if isinstance(item, tuple | list | str))
        if self.copied > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"The pickle copies more than {MAX_PICKLE_BYTES} elements by calls; refused"
            )
        self.stack[-1] = call_builder(self.stack[-1], arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name) or type(arguments) is not tuple:
            raise CheckpointError("Damaged pickle: an object without a class")
        self.append(Record(str(kind), arguments))

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_newobj_ex(self) -> None:
        named = self.stack.pop()
        if type(named) is not dict:
            raise CheckpointError("Damaged pickle: named arguments that are not a dictionary")
        self.load_newobj()
        self.stack[-1].entries = named

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not dict:
            raise CheckpointError(f"Damaged pickle: state for a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    # dictionaries: the hashes of keys can be made to collide, which takes time by the square; those of text can't

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Record) else target
        if type(entries) is not dict or len(items) % 2:
            raise CheckpointError(f"Damaged pickle: entries for a {type(target).__name__}")
        self.other_keys += sum(type(key) is not str for key in items[::2])
        if self.other_keys > MAX_OTHER_KEYS_IN_ALL:
            raise CheckpointError(
                f"The pickle has more than {MAX_OTHER_KEYS_IN_ALL} keys that are not text; refused"
            )
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key, len(entries))
            entries[key] = value

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    dispatch[pickle.DICT[0]] = load_dict

    # sets: no model needs what is in them, so their elements are not hashed

    def load_empty_set(self) -> None:
        self.append(Record("builtins.set"))

    dispatch[pickle.EMPTY_SET[0]] = load_empty_set

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(Record("builtins.frozenset", items=items))

    dispatch[pickle.FROZENSET[0]] = load_frozenset
