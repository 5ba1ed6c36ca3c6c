"""Hostile and damaged checkpoints: refused by name, and nothing runs."""

import collections
import io
import os
import pickle
import pickletools
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import CheckpointError
from models import build_detector, load_detector, read_checkpoint, save_detector
from models.checkpoints.inert_pickle import read_pickle
from models.checkpoints.inert_records import Name, Record, StorageRecord, call_builder


class Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def write_archive(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def test_plain_state_dict_reads_as_torch_wrote_it(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    state = collections.OrderedDict(
        a=shared.t(),
        b=shared[1:3],
        c=torch.tensor(3),
        d=torch.zeros(0, 3),
        e=torch.ones(2, dtype=torch.float16),
    )
    for protocol in (2, 4, 5):
        torch.save(state, tmp_path / "state.pt", pickle_protocol=protocol)
        found = read_checkpoint(tmp_path / "state.pt").state
        assert list(found) == list(state)
        for key, tensor in state.items():
            assert torch.equal(found[key], tensor)
            assert found[key].dtype == tensor.dtype


def test_pickled_modules_read_like_their_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.SiLU())
    )
    torch.save({"model": model, "epoch": 3}, tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    assert checkpoint.metadata["model_class"] == "torch.nn.modules.container.Sequential"
    expected = model.state_dict()
    assert list(checkpoint.state) == list(expected)
    assert all(torch.equal(checkpoint.state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch executed",), "system"),
        (eval, ("open('executed', 'w')",), "eval"),
        (exec, ("open('executed', 'w')",), "exec"),
        (getattr, (os, "system"), "getattr|os"),
        (torch.load, ("executed",), "torch.serialization.load"),
        (torch.hub.load, ("executed", "x"), "torch.hub.load"),
        (torch.storage._load_from_bytes, (b"",), "torch.storage._load_from_bytes"),
        (pickle.loads, (b"",), "pickle.loads"),
        (np.load, ("executed",), "numpy.load"),
    ],
)
def test_calls_are_refused_by_name_and_not_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = tuple("os" if argument is os else argument for argument in arguments)
    data = pickle.dumps({"model": Call(function, *arguments)}, protocol)
    with pytest.raises(CheckpointError, match=f"Refused.*({name})"):
        read_checkpoint(write_archive(tmp_path / "evil.pt", data))
    assert not (tmp_path / "executed").exists()


def test_nested_pickle_and_code_objects_are_refused(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(torch.zeros(1), inner)
    data = pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue()), 2)
    with pytest.raises(CheckpointError, match="_load_from_bytes"):
        read_checkpoint(write_archive(tmp_path / "nested.pt", data))


def test_dangerous_class_as_object_is_refused() -> None:
    data = b"\x80\x02csubprocess\nPopen\n)\x81}b."
    with pytest.raises(CheckpointError, match=r"subprocess\.Popen"):
        read_pickle(data)


@pytest.mark.parametrize(
    "name", ["os system", "posix system", "builtins eval", "torch load", "torch.jit load", "sys exit"]
)
def test_dangerous_names_are_refused_even_if_not_called(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"Refused {name.replace(' ', '.')}"):
        read_pickle(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")


def test_text_opcodes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="opcode b'S'"):
        read_pickle(b"S'x'\n.")
    with pytest.raises(CheckpointError, match="opcode b'i'"):
        read_pickle(b"(ios\nsystem\n.")


def test_unknown_class_is_only_described() -> None:
    record = read_pickle(b"\x80\x02cno.such.module\nClass\n)\x81}X\x01\x00\x00\x00aK\x01sb.")
    assert isinstance(record, Record)
    assert record.kind == "no.such.module.Class"
    assert record.state == {"a": 1}


def test_legacy_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a torch zip checkpoint"):
        read_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(shared_data: Path, tmp_path: Path, part: float) -> None:
    data = (shared_data / "weights" / "gelan-t-bccd.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointError, match="cut off"):
        load_detector(tmp_path / "cut.pt")


def replace_in_pickle(source: Path, target: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for info in before.infolist():
            data = before.read(info)
            after.writestr(
                info.filename, data.replace(old, new) if info.filename.endswith("data.pkl") else data
            )


def test_declared_sizes_are_checked(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(200, 3)}, tmp_path / "good.pt")
    numel = b"M\x58\x02"  # 600, little-endian
    replace_in_pickle(tmp_path / "good.pt", tmp_path / "storage.pt", numel, b"J\xff\xff\xff\x7f")
    with pytest.raises(CheckpointError, match="should have 8589934588 bytes and is 2400 bytes"):
        read_checkpoint(tmp_path / "storage.pt")
    replace_in_pickle(
        tmp_path / "good.pt", tmp_path / "tensor.pt", b"K\xc8K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86"
    )
    with pytest.raises(CheckpointError, match="doesn't fit its storage"):
        read_checkpoint(tmp_path / "tensor.pt")


def test_cyclic_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    model._modules["loop"] = model
    torch.save({"model": model}, tmp_path / "cyclic.pt")
    with pytest.raises(CheckpointError, match="contain themselves"):
        read_checkpoint(tmp_path / "cyclic.pt")


def test_deep_and_wide_pickles_end(tmp_path: Path) -> None:
    deep = b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b"."
    with pytest.raises(CheckpointError, match="holds no model"):
        read_checkpoint(write_archive(tmp_path / "deep.pt", deep))
    with pytest.raises(CheckpointError, match="opcodes"):
        read_pickle(b"\x80\x02" + b"N0" * 1_000_000 + b".")


def test_colliding_keys_are_refused() -> None:
    keys = b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, 30_000))
    with pytest.raises(CheckpointError, match="keys that are not text"):
        read_pickle(b"\x80\x02}(" + keys + b"u.")


def test_object_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", a=np.array([Call(os.system, "touch executed")], dtype=object))
    with pytest.raises(CheckpointError, match="header of plain numbers"):
        read_checkpoint(tmp_path / "evil.npz")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt does not exist"):
        load_detector(tmp_path / "absent.pt")


def test_reader_understands_every_opcode_torch_writes(shared_data: Path) -> None:
    for name in ("gelan-t-bccd.pt", "gelan-t-bccd-unstripped.pt", "ultralytics-yolov9t-ball.pt"):
        with zipfile.ZipFile(shared_data / "weights" / name) as archive:
            (entry,) = [item for item in archive.namelist() if item.endswith("data.pkl")]
            data = archive.read(entry)
        assert {op.name for op, _, _ in pickletools.genops(data)}
        assert isinstance(read_pickle(data), dict)


def test_saved_detector_comes_back(tmp_path: Path) -> None:
    detector = build_detector("yolov9t", 2, "relu", ("cat", "dög"))
    save_detector(detector, tmp_path / "run" / "model.safetensors")
    back = load_detector(tmp_path / "run" / "model.safetensors")
    assert (back.names, back.activation, back.architecture) == (("cat", "dög"), "relu", "yolov9t")
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in detector.state_dict().items())


def timed_refusal(data: bytes, path: Path, message: str) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(write_archive(path, data))
    assert time.process_time() - start < 5


def test_work_is_bounded(tmp_path: Path) -> None:
    big = b"](" + b"K\x01" * 50_000 + b"eq\x00"
    timed_refusal(
        b"\x80\x02" + big + b"ctorch\nSize\nq\x010" + b"h\x01h\x00\x85R0" * 20_000 + b"N.",
        tmp_path / "a",
        "size",
    )
    call = b"h\x01h\x00\x85R0"
    timed_refusal(
        b"\x80\x02" + big + b"cbuiltins\nset\nq\x010" + call * 20_000 + b"N.", tmp_path / "b", "copies"
    )
    text = b"X" + (60_000).to_bytes(4, "little") + b"a" * 60_000 + b"q\x00X\x06\x00\x00\x00latin1q\x02"
    call = b"h\x01h\x00h\x02\x86R0"
    timed_refusal(
        b"\x80\x02" + text + b"c_codecs\nencode\nq\x010" + call * 20_000 + b"N.", tmp_path / "c", "copies"
    )
    timed_refusal(b"\x80\x02Nr\xff\xff\xff\x7f.", tmp_path / "d", "holds no model")  # a memo index


def test_sets_are_described_and_not_hashed() -> None:
    for protocol in (2, 4):
        record = read_pickle(pickle.dumps({"a": {1}, "b": frozenset({2}), "c": set()}, protocol))
        assert [record[key].kind for key in "abc"] == ["builtins.set", "builtins.frozenset", "builtins.set"]
        assert all(not isinstance(value, set | frozenset) for value in record.values())


def test_long_module_paths_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Module()
    for _ in range(20):
        parent = torch.nn.Module()
        parent._modules["x" * 400] = model
        model = parent
    torch.save({"model": model}, tmp_path / "long.pt")
    with pytest.raises(CheckpointError, match="nested deeper"):
        read_checkpoint(tmp_path / "long.pt")


def test_shared_storages_are_read_once_and_bounded(tmp_path: Path) -> None:
    flat = torch.zeros(1_000_000)
    torch.save({f"w{i}": flat[i : i + 10] for i in range(2000)}, tmp_path / "views.pt")
    start = time.process_time()
    assert len(read_checkpoint(tmp_path / "views.pt").state) == 2000
    assert time.process_time() - start < 5
    torch.save({f"w{i}": flat for i in range(20)}, tmp_path / "claims.pt")
    with pytest.raises(CheckpointError, match="claim more than"):
        read_checkpoint(tmp_path / "claims.pt")


def test_tensors_with_attributes_are_read(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.note = "mine"  # type: ignore[attr-defined]
    plain = torch.full((2,), 2.0)
    plain.note = "mine"  # type: ignore[attr-defined]
    torch.save({"a": weight, "b": plain}, tmp_path / "a.pt")
    state = read_checkpoint(tmp_path / "a.pt").state
    assert state["a"].tolist() == [1, 1, 1]
    assert state["b"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("size", "stride", "offset", "accepted"),
    [
        ((2, 3), (3, 1), 0, True),
        ((2, 3), (3, 1), 4, True),
        ((2, 3), (3, 1), 5, False),
        ((1, 10), (2**100, 1), 0, True),
        ((0, 3), (3, 1), 2**100, True),
        ((0, 2**100), (3, 1), 0, False),
        ((11,), (0,), 0, False),
        ((2,), (-1,), 5, False),
        ((2**62, 2**62), (0, 0), 0, False),
        ((True,), (1,), 0, False),
    ],
)
def test_views_stay_inside_their_storage(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, accepted: bool
) -> None:
    arguments = (StorageRecord("float32", "0", 10), offset, size, stride)
    function = Name("torch._utils", "_rebuild_tensor_v2")
    if accepted:
        record = call_builder(function, arguments)
        assert torch.zeros(10).as_strided(record.size, record.stride, record.offset).shape == size
    else:
        with pytest.raises(CheckpointError):
            call_builder(function, arguments)
