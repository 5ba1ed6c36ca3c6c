"""A pickle reader that runs nothing: it builds plain data, and describes everything else.

A `.pt` file holds a pickle, and a pickle is a program: Python's reader imports what it names and calls it. This one
has no way to do so. It interprets the binary opcodes that torch writes (protocols 2 to 5) with its own stack, and

- plain data (numbers, text, bytes, lists, tuples, dicts, sets) is built as such;
- a name (`models.yolo DetectionModel`) becomes a `Name`, two strings; nothing is imported;
- an object of a class becomes a `Record`: the class's name, its arguments and its state;
- a tensor becomes a `TensorRecord`: a checked description of where its numbers lie in the archive, read later if
  wanted;
- a call (`REDUCE`) of anything but a short list of known, side-effect-free builders is refused, by name; so are
  names from modules that a model has no business with (`os`, `subprocess`, `builtins.eval`, `torch.load`, ...), even
  if they are not called.

Bounds: size of the pickle, number of opcodes, size of integers, number of dictionary keys that are not text. The
structures may be cyclic and deep; whoever walks them must bound the walk.
"""

import struct
from collections.abc import Callable
from typing import Any

from core.errors import CheckpointError
from models.checkpoints.inert_records import (
    HASHING_BUILDERS,
    MAX_NAME_LENGTH,
    STORAGE_DTYPES,
    Name,
    Record,
    StorageRecord,
    call_builder,
    check_key,
    check_name,
    set_entry,
)

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPCODES = 1_000_000
MAX_INTEGER_BYTES = 16
MAX_OTHER_KEYS_IN_ALL = 40_000
MAX_PROTOCOL = 5


def read_pickle(data: bytes) -> Any:
    """Interpret one pickle without importing or running anything.

    Args:
        data: The pickle, at most 64 MiB and 2,000,000 opcodes.

    Returns:
        Plain data, with `Name`, `Record` and `TensorRecord` where the pickle has classes, objects and tensors.

    Raises:
        CheckpointError: If the pickle is damaged, too large, uses an opcode that torch does not write, or asks for a
            call or a name that is refused.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"The pickle has {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    return _Machine(data).run()


class _Machine:
    """The pickle's stack machine. `handlers` maps each opcode that is understood to a method."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.other_keys = 0

    def run(self) -> Any:
        try:
            for _ in range(MAX_OPCODES):
                opcode = self.take(1)[0]
                if opcode == ord("."):
                    return self.stack.pop()
                handler = _HANDLERS.get(opcode)
                if handler is None:
                    raise CheckpointError(
                        f"Refused pickle opcode {bytes([opcode])!r} at byte {self.position - 1}; "
                        "torch does not write it"
                    )
                handler(self)
        except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(
                f"Damaged pickle at byte {self.position}: {type(error).__name__}"
            ) from error
        raise CheckpointError(f"The pickle has more than {MAX_OPCODES} opcodes; refused")

    # --- reading

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise CheckpointError(f"Truncated pickle: byte {end} is wanted, {len(self.data)} are there")
        result = self.data[self.position : end]
        self.position = end
        return result

    def take_number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def take_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 512)
        if end < 0:
            raise CheckpointError(f"Damaged pickle: a name at byte {self.position} does not end")
        line = self.data[self.position : end]
        self.position = end + 1
        return line.decode("utf-8")

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # --- opcodes that need more than a line

    def protocol(self) -> None:
        version = self.take(1)[0]
        if version > MAX_PROTOCOL:
            raise CheckpointError(
                f"Pickle protocol {version} is unknown; protocols up to {MAX_PROTOCOL} are read"
            )

    def push_integer(self) -> None:
        size = self.take(1)[0]
        if size > MAX_INTEGER_BYTES:
            raise CheckpointError(f"An integer of {size} bytes; at most {MAX_INTEGER_BYTES} are read")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def push_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise CheckpointError("Damaged pickle: a name that is not text")
        self.stack.append(check_name(module, name))

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is tuple:
            self.copied += sum(len(item) for item in arguments if isinstance(item, tuple | list | set | str))
            if isinstance(function, Name) and function in HASHING_BUILDERS and arguments:
                self.count_other_keys(len(arguments[0]))
        if self.copied > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"The pickle copies more than {MAX_PICKLE_BYTES} elements by calls; refused"
            )
        self.stack[-1] = call_builder(function, arguments)

    def count_other_keys(self, count: int) -> None:
        """Count keys that are not text: their hashes can be made to collide, which takes time by the square."""
        self.other_keys += count
        if self.other_keys > MAX_OTHER_KEYS_IN_ALL:
            raise CheckpointError(
                f"The pickle has more than {MAX_OTHER_KEYS_IN_ALL} keys that are not text; refused"
            )

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name) or type(arguments) is not tuple:
            raise CheckpointError("Damaged pickle: an object without a class")
        self.stack.append(Record(str(kind), arguments))

    def new_object_with_names(self) -> None:
        named = self.stack.pop()
        if type(named) is not dict:
            raise CheckpointError("Damaged pickle: named arguments that are no dictionary")
        self.new_object()
        self.stack[-1].entries = named

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not dict:
            raise CheckpointError(f"Damaged pickle: state for a {type(target).__name__}")

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise CheckpointError(f"Damaged pickle: elements for a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Record) else target
        if type(entries) is not dict or len(items) % 2:
            raise CheckpointError(f"Damaged pickle: entries for a {type(target).__name__}")
        self.count_other_keys(sum(type(key) is not str for key in items[::2]))
        for index in range(0, len(items), 2):
            set_entry(entries, items[index], items[index + 1])

    def add_items(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise CheckpointError(f"Damaged pickle: set elements for a {type(target).__name__}")
        self.count_other_keys(len(items))
        for item in items:
            check_key(item, len(target))
            target.add(item)

    def push_frozenset(self) -> None:
        items = self.pop_mark()
        self.count_other_keys(len(items))
        for item in items:
            check_key(item, len(items))
        self.stack.append(frozenset(items))

    def push_storage(self) -> None:
        """A persistent id: ('storage', Name of the storage class, key, device, numel)."""
        identity = self.stack.pop()
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise CheckpointError("Damaged pickle: a persistent id that is not a tensor's storage")
        _, kind, key, _, numel = identity
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
        if dtype is None:
            raise CheckpointError(
                f"Storage class {str(kind)[:80]} is not supported; expected one of torch.{', '.join(STORAGE_DTYPES)}"
            )
        if (
            type(key) is not str
            or len(key) > MAX_NAME_LENGTH
            or not key.isalnum()
            or type(numel) is not int
            or numel < 0
        ):
            raise CheckpointError("Damaged pickle: a storage without a key or a size")
        self.stack.append(StorageRecord(dtype, key, numel))

    def push_mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> None:
        self.pop_mark()

    def frame(self) -> None:
        self.take(8)

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise CheckpointError("Damaged pickle: the stack is too short")
        items = tuple(self.stack[-count:])
        self.stack[-count:] = [items]

    def add_element(self) -> None:
        item = self.stack.pop()
        self.append_items([item])

    def set_element(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def push_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)


def _pushing(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        result = value(machine)  # may replace machine.stack, so it comes first
        machine.stack.append(result)

    return handler


def _remember(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    ord("\x80"): _Machine.protocol,
    ord("\x95"): _Machine.frame,
    ord("("): _Machine.push_mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_to_mark,
    ord("2"): _pushing(lambda m: m.stack[-1]),
    ord("N"): _pushing(lambda m: None),
    ord("\x88"): _pushing(lambda m: True),
    ord("\x89"): _pushing(lambda m: False),
    ord("J"): _pushing(lambda m: m.take_number("<i")),
    ord("K"): _pushing(lambda m: m.take_number("<B")),
    ord("M"): _pushing(lambda m: m.take_number("<H")),
    ord("G"): _pushing(lambda m: m.take_number(">d")),
    ord("\x8a"): _Machine.push_integer,
    ord("X"): _pushing(lambda m: m.take(m.take_number("<I")).decode("utf-8", "surrogatepass")),
    ord("\x8c"): _pushing(lambda m: m.take(m.take_number("<B")).decode("utf-8", "surrogatepass")),
    ord("\x8d"): _pushing(lambda m: m.take(m.take_number("<Q")).decode("utf-8", "surrogatepass")),
    ord("B"): _pushing(lambda m: m.take(m.take_number("<I"))),
    ord("C"): _pushing(lambda m: m.take(m.take_number("<B"))),
    ord("\x8e"): _pushing(lambda m: m.take(m.take_number("<Q"))),
    ord(")"): _pushing(lambda m: ()),
    ord("]"): _pushing(lambda m: []),
    ord("}"): _pushing(lambda m: {}),
    ord("\x8f"): _pushing(lambda m: set()),
    ord("t"): _pushing(lambda m: tuple(m.pop_mark())),
    ord("\x85"): lambda m: m.push_tuple(1),
    ord("\x86"): lambda m: m.push_tuple(2),
    ord("\x87"): lambda m: m.push_tuple(3),
    ord("l"): _pushing(lambda m: m.pop_mark()),
    ord("d"): _Machine.push_dict,
    ord("a"): _Machine.add_element,
    ord("e"): lambda m: m.append_items(m.pop_mark()),
    ord("s"): _Machine.set_element,
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    ord("\x90"): _Machine.add_items,
    ord("\x91"): _Machine.push_frozenset,
    ord("q"): lambda m: _remember(m, m.take_number("<B")),
    ord("r"): lambda m: _remember(m, m.take_number("<I")),
    ord("\x94"): lambda m: _remember(m, len(m.memo)),
    ord("h"): _pushing(lambda m: m.memo[m.take_number("<B")]),
    ord("j"): _pushing(lambda m: m.memo[m.take_number("<I")]),
    ord("c"): _pushing(lambda m: check_name(m.take_line(), m.take_line())),
    ord("\x93"): _Machine.push_stack_global,
    ord("R"): _Machine.reduce,
    ord("\x81"): _Machine.new_object,
    ord("\x92"): _Machine.new_object_with_names,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.push_storage,
}
