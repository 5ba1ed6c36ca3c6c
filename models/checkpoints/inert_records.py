"""What an inert pickle reader may build: descriptions of objects and tensors, and the few builders that run for them.

`models.checkpoints.inert_pickle` interprets the opcodes; here are the decisions: which names are refused, which
calls are known, which keys are accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from core.errors import CheckpointError

MAX_OTHER_KEYS = 4_000
MAX_KEY_LENGTH = 1024
MAX_NAME_LENGTH = 300
MAX_DIMENSIONS = 8
MAX_EMPTY_LENGTH = 2**16


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

    def append(self, item: Any) -> None:
        """Take an element, as the pickle reader hands it to a list."""
        self.items.append(item)

    def extend(self, items: list[Any]) -> None:
        """Take elements, as the pickle reader hands them to a list."""
        self.items.extend(items)

    add = append  # as it hands them to a set


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
    {"set", "frozenset", "getattr", "list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "bytearray",
     "complex", "slice", "range", "object"}
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
    "torch.multiprocessing", "torch.testing", "torch.onnx", "torch.compiler", "torch.library", "torch.ops",
    "torch.classes",     "torch._ops", "torch._C", "torch._inductor", "torch._dynamo", "torch.fx", "torch.storage",
)  # fmt: skip

TORCH_NAMES = frozenset(STORAGE_DTYPES) | {
    "Size", "device", "Tensor", "dtype", "memory_format", "strided", "contiguous_format", "preserve_format",
    "channels_last", "float32", "float", "float64", "double", "float16", "half", "bfloat16", "int64", "long",
    "int32", "int", "int16", "short", "int8", "uint8", "bool",
}  # fmt: skip


def check_name(module: str, name: str) -> Name:
    """Accept a name for description, or refuse it.

    Raises:
        CheckpointError: If it is in a module that could run something, or is not a plain dotted name.
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


def call_builder(function: Any, arguments: Any) -> Any:
    """What `function(*arguments)` becomes: known builders give data, classes of inert values give records."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise CheckpointError("Refused a call of something that is not a name; nothing was executed")
    builder = _BUILDERS.get(str(function))
    if builder is None:
        raise CheckpointError(
            f"Refused to call {function}: not one of the builders that a checkpoint needs; nothing was executed"
        )
    try:
        return builder(arguments)
    except (TypeError, ValueError, IndexError, LookupError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"Damaged pickle: bad arguments for {function}") from error


def check_key(key: Any, present: int) -> None:
    """Accept a key for a container of `present` keys, or refuse it.

    Keys are short text, numbers, None or flat tuples of those: hashing anything deeper, or comparing anything
    longer, could hang.
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


_KEY_TYPES = (str, int, float, bool, bytes, type(None))


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        (pairs,) = arguments
        result: dict[Any, Any] = {}
        for key, value in pairs:
            check_key(key, len(result))
            result[key] = value
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
        raise CheckpointError(
            "Damaged pickle: a tensor whose sizes, strides or offset are not natural numbers"
        )
    count, last = 1, offset
    for length, step in zip(shape, steps, strict=True):
        count *= length
        last += max(length - 1, 0) * step
    if count > storage.numel or (count and last >= storage.numel):
        raise CheckpointError(
            f"A tensor of size {shape} at offset {offset} doesn't fit its storage {storage.key!r} "
            f"of {storage.numel} numbers"
        )
    if count == 0:
        if max(shape) > MAX_EMPTY_LENGTH:
            raise CheckpointError(f"Damaged pickle: an empty tensor of size {shape}")
        return TensorRecord(storage, 0, shape, (0,) * len(shape))
    return TensorRecord(
        storage, offset, shape, tuple(s if n > 1 else 1 for n, s in zip(shape, steps, strict=True))
    )


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Any:
    if not isinstance(arguments[0], TensorRecord):
        raise CheckpointError("Damaged pickle: a parameter without a tensor")
    return arguments[0]


def _encode(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "utf8", "ascii"):
        raise CheckpointError("Refused _codecs.encode with an unusual encoding")
    return text.encode(encoding)


def _describe(kind: str) -> Callable[[tuple[Any, ...]], Record]:
    return lambda arguments: Record(kind, arguments)


def _reconstruct(arguments: tuple[Any, ...]) -> Record:
    if not isinstance(arguments[0], Name):
        raise CheckpointError("Damaged pickle: an object without a class")
    return Record(str(arguments[0]))


def _bound_method(arguments: tuple[Any, ...]) -> Record:
    """`getattr(object, "name")` of an inert object: how pickles write bound methods, e.g. a fused block's `forward`."""
    owner, name = arguments
    if not isinstance(owner, Record) or type(name) is not str or not name[:MAX_NAME_LENGTH].isidentifier():
        raise CheckpointError(
            "Refused getattr of something that is not a described object; nothing was executed"
        )
    return Record("bound method", (owner, name))


def _rebuild_from_type(arguments: tuple[Any, ...]) -> Any:
    """A tensor with attributes: (rebuild function, class, arguments, attributes). The attributes are left out."""
    function, _, inner = arguments[:3]
    if not isinstance(function, Name) or str(function) not in _TENSOR_BUILDERS or type(inner) is not tuple:
        raise CheckpointError(f"Refused to rebuild a tensor by {str(function)[:80]}; nothing was executed")
    return _TENSOR_BUILDERS[str(function)](inner)


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if type(arguments[0]) not in (tuple, list) or len(arguments[0]) > MAX_DIMENSIONS:
        raise CheckpointError(f"Damaged pickle: a size of more than {MAX_DIMENSIONS} dimensions")
    return tuple(arguments[0])


_TENSOR_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}

_BUILDERS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.Counter": _describe("collections.Counter"),
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda arguments: {},
    "torch.Size": _size,
    "torch.device": _describe("torch.device"),
    "_codecs.encode": _encode,
    **{
        f"{module}.{name}": _describe(f"builtins.{name}")
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset")
    },
    "builtins.getattr": _bound_method,
    "__builtin__.getattr": _bound_method,
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
