"""What a file is, by its content: a checkpoint that can be read, or something else that is taken for one.

The suffix decides only if the content does not. A file that is not a checkpoint is reported in one line with the
remedy.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

from core.errors import CheckpointError

HEAD_BYTES = 4096
MAX_DIRECTORY_BYTES = 5_000_000  # of a zip file; the largest checkpoint tried has 150,000
ONNX_FIELDS = b"\x12\x1a\x22\x28\x32\x3a\x42\x72"  # tags that follow the version in an ONNX model
MAX_ONNX_VERSION = 32
_UNPACK = "unpack it first"
_DOWNLOAD = "download the file itself"
_EXPORT = (
    "an export, not a checkpoint: give the weights that it was made from "
    "(python -m pipeline.evaluate measures exports)"
)


@dataclass(frozen=True)
class Signature:
    """Bytes that a kind of file has at a fixed place.

    Attributes:
        magic: The bytes.
        what: What the file is, for the message.
        remedy: What to do about it.
        offset: Where the bytes are.
    """

    magic: bytes
    what: str
    remedy: str
    offset: int = 0


SIGNATURES = (
    Signature(b"version https://git-lfs", "a git-lfs pointer", "fetch the file with: git lfs pull"),
    Signature(b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras)", "Octet reads PyTorch checkpoints"),
    Signature(b"\x1f\x8b", "compressed with gzip", _UNPACK),
    Signature(b"BZh", "compressed with bzip2", _UNPACK),
    Signature(b"\xfd7zXZ\x00", "compressed with xz", _UNPACK),
    Signature(b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK),
    Signature(b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    Signature(b"Rar!", "a RAR archive", _UNPACK),
    Signature(b"ustar", "a tar archive", _UNPACK, offset=257),
    Signature(b"ftrt", "a TensorRT engine", _EXPORT),
    Signature(b"vtrt", "a TensorRT for RTX engine", _EXPORT),
    Signature(b"TFL3", "a TensorFlow Lite model", _EXPORT, offset=4),
    Signature(b"\x89PNG", "a PNG image", "give the path of the weights"),
    Signature(b"\xff\xd8\xff", "a JPEG image", "give the path of the weights"),
    Signature(b"%PDF", "a PDF document", _DOWNLOAD),
)


def find_format(path: Path) -> str:
    """`torch`, `safetensors` or `npz`, by content.

    Raises:
        CheckpointError: If the file is something else that is known; says what, and what to do about it.
    """
    size = path.stat().st_size
    if size == 0:
        raise _refusal(path, "empty (0 bytes)", "the download or the copy failed: download or copy it again")
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for signature in SIGNATURES:
        if head[signature.offset :].startswith(signature.magic):
            raise _refusal(path, signature.what, signature.remedy)
    if head.startswith(b"PK"):
        return _find_in_zip(path)
    if _is_safetensors(head, size):
        return "safetensors"
    _refuse_text(path, head)
    if head[0] == 8 and len(head) > 2 and head[1] <= MAX_ONNX_VERSION and head[2] in ONNX_FIELDS:
        raise _refusal(path, "an ONNX graph", _EXPORT)
    if _is_engine_with_header(head, size):
        raise _refusal(path, "a TensorRT engine with a header of JSON (Ultralytics)", _EXPORT)
    return {".safetensors": "safetensors", ".npz": "npz"}.get(path.suffix, "torch")


def _refusal(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{path} is {what}; {remedy}")


def check_directory(path: Path) -> None:
    """Refuse a zip file whose directory is too large, before all of it is read.

    Raises:
        CheckpointError: it is.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
        raise CheckpointError(f"{path} has a directory of more than {MAX_DIRECTORY_BYTES} bytes; refused")


def _find_in_zip(path: Path) -> str:
    try:
        check_directory(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError):
        return "npz" if path.suffix == ".npz" else "torch"  # whose reader says what is wrong
    parts = [name.partition("/")[2] for name in names]
    if "constants.pkl" in parts or any(part.startswith("code/") for part in parts):
        raise _refusal(
            path,
            "a TorchScript archive",
            "its graph is code, which is not run: give the checkpoint that it was exported from",
        )
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    if "model.weights.h5" in names:
        raise _refusal(path, "a Keras archive", "Octet reads PyTorch checkpoints")
    return "npz" if path.suffix == ".npz" else "torch"


def _is_safetensors(head: bytes, size: int) -> bool:
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _is_engine_with_header(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:4], "little")
    return head[4:5] == b"{" and 2 <= length <= size - 4


def _refuse_text(path: Path, head: bytes) -> None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:HEAD_BYTES].lower()
    if start.startswith((b"<!doctype html", b"<html")) or (start.startswith(b"<") and b"<html" in start):
        raise _refusal(path, "an HTML page", f"a web page was saved instead of the file: {_DOWNLOAD}")
    if start.startswith(b"<?xml") or start.startswith(b"<net"):
        if b"<net" in start:
            raise _refusal(path, "the XML file of an OpenVINO model", _EXPORT)
        raise _refusal(path, "an XML file", "give the path of the weights")
    if start.startswith((b"{", b"[")) and b"\x00" not in head:
        raise _refusal(path, "a JSON file", "give the path of the weights")
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        raise _refusal(path, "a text file", "give the path of the weights")
