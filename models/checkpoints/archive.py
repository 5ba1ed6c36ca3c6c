"""Reading the containers (torch's zip archives, `.npz`, `.safetensors`), with a check of each declared size.

Torch stores (never compresses) its entries, so in an honest file all entries together are smaller than the file.
That is the memory bound: nothing is allocated for a size that the file itself does not have.
"""

import collections
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core import documents
from core.errors import CheckpointError
from models.checkpoints.inert_pickle import read_pickle
from models.checkpoints.inert_records import StorageRecord, TensorRecord

DAMAGED = "it is damaged: copy it again. If a run made it, remove it and resume the run, which makes it again"
MAX_ENTRIES = 50_000  # one for each storage; the largest file tried has 1,500
MAX_NPZ_BYTES = 2**29
MAX_NPZ_ENTRIES = 50_000
MAX_NPY_HEADER = 1024
MAX_JSON_BYTES = 2**20
_NPY_HEADER = re.compile(
    r"\{'descr': '(?P<type>[<>|][fiub][1248])', 'fortran_order': (?P<order>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,18},? ?){0,8})\),? ?\} *\n?$"
)
_NPY_ORDER: dict[str, Literal["C", "F"]] = {"False": "C", "True": "F"}
ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    OSError,
    EOFError,
    struct.error,
    zlib.error,
    ValueError,
    OverflowError,
    LookupError,
)


class TorchArchive:
    """An open torch zip checkpoint: `pickle()` gives its inert content, `tensor()` the numbers of one tensor.

    Use as a context manager.

    Raises:
        CheckpointError: If the file isn't a torch zip archive, is damaged, or its entries claim more than the file
            holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except ZIP_ERRORS as error:
            raise CheckpointError(
                f"{path} is not a torch zip checkpoint ({error}). A file that is cut off must be copied again; "
                "one from before torch 1.6 must be saved again with a newer torch"
            ) from error
        self.entries = {info.filename: info for info in self.zip.infolist()}
        self.root = self._check_entries()

    def __enter__(self) -> "TorchArchive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.zip.close()

    def _check_entries(self) -> str:
        size = self.path.stat().st_size
        infos = self.zip.infolist()
        if len(infos) > MAX_ENTRIES or len(infos) != len(self.entries):
            raise CheckpointError(f"{self.path} has {len(infos)} entries, some twice or too many; refused")
        for info in infos:
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.file_size != info.compress_size
                or info.flag_bits & 1
            ):
                raise CheckpointError(
                    f"{self.path}: entry {info.filename!r} is compressed or encrypted; torch writes plain entries"
                )
        declared = sum(info.file_size for info in infos)
        if declared > size:
            raise CheckpointError(
                f"{self.path}: entries declare {declared} bytes, the file has {size}; it is damaged"
            )
        roots = [
            name.removesuffix("data.pkl")
            for name in self.entries
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise CheckpointError(
                f"{self.path} is a zip file without exactly one data.pkl; expected a torch checkpoint"
            )
        return roots[0]

    def read(self, name: str) -> bytes:
        """Bytes of one entry, by its name inside the archive's folder; the checksum is verified."""
        try:
            return self.zip.read(self.entries[self.root + name])
        except KeyError as error:
            raise CheckpointError(f"{self.path} has no entry {name!r}; the file is damaged") from error
        except ZIP_ERRORS as error:
            raise CheckpointError(
                f"{self.path}: entry {name!r} can't be read ({error}); the file is damaged"
            ) from error

    def pickle(self) -> Any:
        """The archive's content as inert data, see `read_pickle`."""
        if self.root + "byteorder" in self.entries and self.read("byteorder") != b"little":
            raise CheckpointError(
                f"{self.path} was written on a big-endian machine; only little-endian files are read"
            )
        try:
            return read_pickle(self.read("data.pkl"))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def tensors(self, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
        """Read tensors, each into its own memory, in the type it was stored in; each storage is read once.

        Raises:
            CheckpointError: See `storage`; also if views of shared storages claim more than twice what the file
                holds.
        """
        uses = collections.Counter(record.storage for record in records.values())
        bound = 2 * self.path.stat().st_size + 2**20
        shared: dict[StorageRecord, Tensor] = {}
        result: dict[str, Tensor] = {}
        claimed = 0
        for key, record in records.items():
            flat = shared[record.storage] if record.storage in shared else self.storage(record.storage)
            if uses[record.storage] > 1:
                shared[record.storage] = flat
            view = flat.as_strided(record.size, record.stride, record.offset)
            claimed += view.numel() * view.element_size()
            if claimed > bound:
                raise CheckpointError(
                    f"{self.path}: its tensors claim more than {bound} bytes, twice what the file holds"
                )
            result[key] = view.clone(memory_format=torch.contiguous_format)
        return result

    def storage(self, record: StorageRecord) -> Tensor:
        """All numbers of one storage, flat.

        Raises:
            CheckpointError: If the storage's entry is missing, damaged, or not as large as the pickle says.
        """
        dtype = getattr(torch, record.dtype)
        name = f"data/{record.key}"
        info = self.entries.get(self.root + name)
        expected = record.numel * dtype.itemsize
        if info is None or info.file_size != expected:
            found = "missing" if info is None else f"{info.file_size} bytes"
            raise CheckpointError(
                f"{self.path}: storage {record.key!r} should have {expected} bytes and is {found}"
            )
        if record.numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self.read(name)), dtype=dtype)


def read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of an `.npz` file as tensors; object arrays (which hold pickles) and lying headers are refused.

    Raises:
        CheckpointError: If the file is damaged, larger than 512 MiB unpacked, or holds anything but plain numeric
            arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            declared = sum(info.file_size for info in infos)
            if declared > MAX_NPZ_BYTES or len(infos) > MAX_NPZ_ENTRIES:
                raise CheckpointError(
                    f"{path}: {len(infos)} arrays of {declared} bytes; at most {MAX_NPZ_BYTES} are read"
                )
            return {
                info.filename.removesuffix(".npy"): _read_npy(archive.open(info), info, path)
                for info in infos
            }
    except CheckpointError:
        raise
    except ZIP_ERRORS as error:
        raise CheckpointError(f"{path} is not a readable .npz file ({error}); {DAMAGED}") from error


def _read_npy(stream: IO[bytes], info: zipfile.ZipInfo, path: Path) -> Tensor:
    """One array.

    Its header is matched as text: numpy's own reader compiles it as a Python expression, and allocates the shape that
    it declares before it reads.
    """
    with stream:
        start = stream.read(8)
        if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\x00", b"\x02\x00"):
            raise CheckpointError(f"{path}: {info.filename!r} is not a .npy array of format 1.0 or 2.0")
        layout = "<H" if start[6] == 1 else "<I"
        (length,) = struct.unpack(layout, stream.read(struct.calcsize(layout)))
        header = stream.read(min(length, MAX_NPY_HEADER)).decode("latin-1")
        match = _NPY_HEADER.match(header)
        if length > MAX_NPY_HEADER or match is None:
            raise CheckpointError(
                f"{path}: array {info.filename!r} has no header of plain numbers: {header[:120]!r}"
            )
        dtype = np.dtype(match["type"])
        shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
        count = 1
        for size in shape:
            count *= size
        if count * dtype.itemsize > info.file_size:
            raise CheckpointError(
                f"{path}: array {info.filename!r} declares shape {shape}, more than its {info.file_size} bytes"
            )
        data = stream.read(count * dtype.itemsize)
        array = np.frombuffer(data, dtype=dtype, count=count).reshape(shape, order=_NPY_ORDER[match["order"]])
        return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a `.safetensors` file (the format has no code; the library checks all sizes).

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as archive:
            return {key: archive.get_tensor(key) for key in archive.keys()}, dict(archive.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable .safetensors file ({error}); {DAMAGED}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object.

    Raises:
        CheckpointError: If it is missing, damaged or not an object.
    """
    try:
        content = documents.read_json(path, MAX_JSON_BYTES)
    except (OSError, documents.DocumentError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file ({error}); {DAMAGED}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content
