"""A pickle reader that runs nothing: it builds plain data, and describes everything else.

A `.pt` file holds a pickle, and a pickle is a program: Python's reader imports what it names and calls it. This one has no way to do so.
It interprets the binary opcodes that torch writes (protocols 2 to 5) with its own stack, and

- plain data (numbers, text, bytes, lists, tuples, dicts, sets) is built as such;
- a name (`models.yolo DetectionModel`) becomes a `Name`, two strings; nothing is imported;
- an object of a class becomes a `Record`: the class's name, its arguments and its state;
- a tensor becomes a `TensorRecord`: a checked description of where its numbers lie in the archive, read later if wanted;
- a call (`REDUCE`) of anything but a short list of known, side-effect-free builders is refused, by name; so are names from modules
  that a model has no business with (`os`, `subprocess`, `builtins.eval`, `torch.load`, ...), even if they are not called.

Bounds: size of the pickle, number of opcodes, size of integers, number of dictionary keys that are not text. The structures may be cyclic and
deep; whoever walks them must bound the walk.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.errors import CheckpointError

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPCODES = 2_000_000
MAX_INTEGER_BYTES = 16
MAX_OTHER_KEYS = 20_000
MAX_KEY_LENGTH = 1024
MAX_NAME_LENGTH = 300
MAX_DIMENSIONS = 8
MAX_PROTOCOL = 5


class Name(NamedTuple):
    """A class or function named by the pickle; only its name, nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Record:
    """An object that was not built: what its pickle says about it.

    Attributes:
        kind: Full name of its class.
        args: Constructor arguments.
        state: What `BUILD` handed over, if anything.
        items: Elements appended, for list-like classes.
        entries: Key-value pairs set, for dict-like classes.
    """

    kind: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


class StorageRecord(NamedTuple):
    """A block of numbers in the archive: `dtype` by name, `key` of its entry, `numel` numbers."""

    dtype: str
    key: str
    numel: int


class TensorRecord(NamedTuple):
    """A view of a storage; sizes, strides and the offset count numbers and are checked to stay inside it."""

    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

SAFE_BUILTINS = frozenset(
    {"set", "frozenset", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "bytearray", "complex",
     "slice", "range", "object"}
)  # fmt: skip

REFUSED_MODULES = frozenset(
    {"os", "posix", "nt", "ntpath", "posixpath", "sys", "subprocess", "shutil", "importlib", "runpy", "pickle",
     "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "socket", "ssl", "ctypes", "_ctypes",
     "cffi", "code", "codeop", "types", "inspect", "pty", "pdb", "bdb", "timeit", "cProfile", "profile", "trace",
     "webbrowser", "urllib", "http", "requests", "ftplib", "smtplib", "asyncio", "multiprocessing", "threading",
     "_thread", "signal", "tempfile", "io", "_io", "builtin", "commands", "operator", "_operator", "functools",
     "_functools", "itertools", "platform", "pip", "pkgutil", "setuptools", "distutils", "sysconfig", "site", "gc",
     "zipimport", "zipfile", "tarfile", "lib2to3", "doctest", "unittest", "test", "idlelib", "turtledemo", "nturl2path",
     "imp", "bz2", "gzip", "lzma", "logging", "weakref"}
)  # fmt: skip

REFUSED_TORCH_MODULES = (
    "torch.serialization", "torch.hub", "torch.jit", "torch.package", "torch.utils", "torch.distributed",
    "torch.multiprocessing", "torch.testing", "torch.onnx", "torch.compiler", "torch.library", "torch.ops", "torch.classes",
    "torch._ops", "torch._C", "torch._inductor", "torch._dynamo", "torch.fx", "torch.storage",
)  # fmt: skip

TORCH_NAMES = frozenset(STORAGE_DTYPES) | {
    "Size", "device", "Tensor", "dtype", "memory_format", "strided", "contiguous_format", "preserve_format", "channels_last",
    "float32", "float", "float64", "double", "float16", "half", "bfloat16", "int64", "long", "int32", "int", "int16",
    "short", "int8", "uint8", "bool",
}  # fmt: skip


def read_pickle(data: bytes) -> Any:
    """Interpret one pickle without importing or running anything.

    Args:
        data: The pickle, at most 64 MiB and 2,000,000 opcodes.

    Returns:
        Plain data, with `Name`, `Record` and `TensorRecord` where the pickle has classes, objects and tensors.

    Raises:
        CheckpointError: If the pickle is damaged, too large, uses an opcode that torch does not write, or asks for a call or a name
            that is refused.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"The pickle has {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    return _Machine(data).run()


def check_name(module: str, name: str) -> Name:
    """Accept a name for description, or refuse it.

    Raises:
        CheckpointError: If it lies in a module that could run something, or is not a plain dotted name.
    """
    full = f"{module[:MAX_NAME_LENGTH]}.{name[:MAX_NAME_LENGTH]}"
    if len(full) > MAX_NAME_LENGTH or not all(part.isidentifier() for part in full.split(".")):
        raise CheckpointError(f"Refused {full[:80]!r}: not a plain dotted name; nothing was executed")
    top = module.split(".")[0]
    refused = top in REFUSED_MODULES
    if module in ("builtins", "__builtin__"):
        refused = name not in SAFE_BUILTINS
    elif module == "torch":
        refused = name not in TORCH_NAMES
    elif any(module == prefix or module.startswith(prefix + ".") for prefix in REFUSED_TORCH_MODULES):
        refused = True
    elif module == "_codecs":
        refused = name != "encode"
    if refused:
        raise CheckpointError(f"Refused {full}: a model's checkpoint has no use for it; nothing was executed")
    return Name(module, name)


def _call(function: Any, arguments: Any) -> Any:
    """Stand in for `function(*arguments)`: known builders give data, classes of inert values give records."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise CheckpointError("Refused a call of something that is not a name; nothing was executed")
    builder = _BUILDERS.get(str(function))
    if builder is None:
        raise CheckpointError(f"Refused to call {function}: not one of the builders that a checkpoint needs; nothing was executed")
    try:
        return builder(arguments)
    except (TypeError, ValueError, IndexError, LookupError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"Damaged pickle: bad arguments for {function}") from error


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        (pairs,) = arguments
        result: dict[Any, Any] = {}
        for key, value in pairs:
            _set_entry(result, key, value)
        return result
    return {}


def _rebuild_tensor(arguments: tuple[Any, ...]) -> TensorRecord:
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, StorageRecord):
        raise CheckpointError("Damaged pickle: a tensor without a storage")
    if len(size) > MAX_DIMENSIONS or len(stride) > MAX_DIMENSIONS:
        raise CheckpointError(f"Damaged pickle: a tensor of {len(size)} dimensions")
    shape, steps = tuple(size), tuple(stride)
    numbers = (offset, *shape, *steps)
    if len(shape) != len(steps):
        raise CheckpointError(f"Damaged pickle: a tensor with {len(shape)} sizes and {len(steps)} strides")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError("Damaged pickle: a tensor whose sizes, strides or offset are not natural numbers")
    count, last = 1, offset
    for length, step in zip(shape, steps, strict=True):
        count *= length
        last += max(length - 1, 0) * step
    if count > storage.numel or (count and last >= storage.numel):
        raise CheckpointError(
            f"A tensor of size {shape} at offset {offset} doesn't fit its storage {storage.key!r} of {storage.numel} numbers"
        )
    return TensorRecord(storage, offset, shape, steps)


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Any:
    if not isinstance(arguments[0], TensorRecord):
        raise CheckpointError("Damaged pickle: a parameter without a tensor")
    return arguments[0]


def _encode(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise CheckpointError("Refused _codecs.encode with an unusual encoding")
    return text.encode(encoding)


def _scalar_set(kind: Callable[[Any], Any]) -> Callable[[tuple[Any, ...]], Any]:
    def build(arguments: tuple[Any, ...]) -> Any:
        elements = arguments[0] if arguments else ()
        for element in elements:
            _check_key(element, len(elements))
        return kind(elements)

    return build


def _describe(kind: str) -> Callable[[tuple[Any, ...]], Record]:
    return lambda arguments: Record(kind, arguments)


def _reconstruct(arguments: tuple[Any, ...]) -> Record:
    if not isinstance(arguments[0], Name):
        raise CheckpointError("Damaged pickle: an object without a class")
    return Record(str(arguments[0]))


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arguments[0])


_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda arguments: {},
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _describe("torch.device"),
    "_codecs.encode": _encode,
    "builtins.set": _scalar_set(set),
    "__builtin__.set": _scalar_set(set),
    "builtins.frozenset": _scalar_set(frozenset),
    "__builtin__.frozenset": _scalar_set(frozenset),
    "copyreg._reconstructor": _reconstruct,
    "copy_reg._reconstructor": _reconstruct,
    "numpy.dtype": _describe("numpy.dtype"),
    **{
        f"numpy.{core}.multiarray.{name}": _describe(f"numpy.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
    **{
        f"{module}.{name}": _describe(f"pathlib.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    },
    **{f"datetime.{name}": _describe(f"datetime.{name}") for name in ("datetime", "date", "timedelta")},
}


def _check_key(key: Any, present: int) -> None:
    """Accept a key for a container of `present` keys, or refuse it.

    Keys are short text, numbers, None or flat tuples of those: hashing anything deeper, or comparing anything longer, could hang.
    """
    if type(key) is str and len(key) <= MAX_KEY_LENGTH:
        return
    flat = key if isinstance(key, tuple) else (key,)
    if len(flat) > MAX_DIMENSIONS or any(type(part) not in _KEY_TYPES for part in flat):
        raise CheckpointError(f"Damaged pickle: a dictionary key of type {type(key).__name__}")
    if any(isinstance(part, str | bytes) and len(part) > MAX_KEY_LENGTH for part in flat):
        raise CheckpointError(f"A dictionary key is longer than {MAX_KEY_LENGTH} characters; refused")
    if present > MAX_OTHER_KEYS:
        raise CheckpointError(f"A dictionary has more than {MAX_OTHER_KEYS} keys that are not text; refused")


def _set_entry(target: dict[Any, Any], key: Any, value: Any) -> None:
    _check_key(key, len(target))
    target[key] = value


_KEY_TYPES = (str, int, float, bool, bytes, type(None))


class _Machine:
    """The pickle's stack machine. `handlers` maps each opcode that is understood to a method."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        try:
            for _ in range(MAX_OPCODES):
                opcode = self.take(1)[0]
                if opcode == ord("."):
                    return self.stack.pop()
                handler = _HANDLERS.get(opcode)
                if handler is None:
                    raise CheckpointError(
                        f"Refused pickle opcode {bytes([opcode])!r} at byte {self.position - 1}: torch does not write it"
                    )
                handler(self)
        except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(f"Damaged pickle at byte {self.position}: {type(error).__name__}") from error
        raise CheckpointError(f"The pickle has more than {MAX_OPCODES} opcodes; refused")

    # --- reading -------------------------------------------------------------------------------------------------------

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

    # --- opcodes that need more than a line ------------------------------------------------------------------------------

    def protocol(self) -> None:
        version = self.take(1)[0]
        if version > MAX_PROTOCOL:
            raise CheckpointError(f"Pickle protocol {version} is unknown; protocols up to {MAX_PROTOCOL} are read")

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
        if type(arguments) is tuple:
            self.copied += sum(len(item) for item in arguments if isinstance(item, tuple | list | set | str))
        if self.copied > MAX_PICKLE_BYTES:
            raise CheckpointError(f"The pickle copies more than {MAX_PICKLE_BYTES} elements by calls; refused")
        self.stack[-1] = _call(self.stack[-1], arguments)

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name) or type(arguments) is not tuple:
            raise CheckpointError("Damaged pickle: an object without a class")
        self.stack.append(Record(str(kind), arguments))

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
        for index in range(0, len(items), 2):
            _set_entry(entries, items[index], items[index + 1])

    def add_items(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise CheckpointError(f"Damaged pickle: set elements for a {type(target).__name__}")
        for item in items:
            _check_key(item, len(target))
            target.add(item)

    def push_frozenset(self) -> None:
        items = self.pop_mark()
        for item in items:
            _check_key(item, len(items))
        self.stack.append(frozenset(items))

    def push_storage(self) -> None:
        """A persistent id: ('storage', Name of the storage class, key, device, numel)."""
        identity = self.stack.pop()
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise CheckpointError("Damaged pickle: a persistent id that is not a tensor's storage")
        _, kind, key, _, numel = identity
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
        if dtype is None:
            raise CheckpointError(f"Storage class {str(kind)[:80]} is not supported; expected one of torch.{', '.join(STORAGE_DTYPES)}")
        if type(key) is not str or len(key) > MAX_NAME_LENGTH or not key.isalnum() or type(numel) is not int or numel < 0:
            raise CheckpointError("Damaged pickle: a storage without a key or a size")
        self.stack.append(StorageRecord(dtype, key, numel))

    def push_mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

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
    ord("\x95"): lambda m: m.take_number("<Q") and None,
    ord("("): _Machine.push_mark,
    ord("0"): _Machine.pop,
    ord("1"): lambda m: m.pop_mark() and None,
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
    ord("b"): _Machine.build,
    ord("Q"): _Machine.push_storage,
}
