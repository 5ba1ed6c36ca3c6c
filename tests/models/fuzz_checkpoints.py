"""Mutate checkpoints and load them: run as a program, prints one line of JSON.

Each mutation is loaded in this process, under an audit hook that notes whatever would start, import, compile or run
something. `STRICT` kinds must end in an error; a flipped bit may also hit a place that means nothing, and then the
load must give a whole network.

    python tests/models/fuzz_checkpoints.py COUNT SEED
"""

import collections
import io
import json
import pickle
import random
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from core.errors import CheckpointError
from core.families import FAMILIES
from models import build_detector, fold_detector, load_detector
from models.checkpoints.convert import official_name
from models.families.registry import load_family

WATCHED_EVENTS = ("exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
                  "pickle.find_class", "ctypes.dlopen", "socket.connect", "os.remove", "os.mkdir",
                  "marshal.loads")  # fmt: skip
HUGE = (2**31 - 1, 2**40, 2**62, 2**63, 2**100)
CALLS = (b"cos\nsystem\n", b"cposix\nsystem\n", b"c__builtin__\neval\n", b"cbuiltins\nexec\n", b"ctorch\nload\n",
         b"ctorch.serialization\nload\n", b"csubprocess\nPopen\n", b"crunpy\nrun_path\n", b"c__builtin__\ngetattr\n",
         b"ctorch.storage\n_load_from_bytes\n", b"cnumpy\nload\n", b"ctorch.nn.modules.conv\nConv2d\n")  # fmt: skip
Mutation = Callable[[random.Random, dict[str, bytes]], tuple[str, bytes]]


def make_bases() -> dict[str, bytes]:
    """Good checkpoints by file name: state dict, pickled module tree, safetensors and npz; folded, half precision."""
    torch.manual_seed(0)
    network = fold_detector(build_detector("yolov9t", 2)).network
    state = {
        f"model.{official_name(network, key)}": tensor.half().contiguous()
        for key, tensor in network.state_dict().items()
    }
    arrays = io.BytesIO()
    np.savez(arrays, **{key: tensor.numpy() for key, tensor in state.items()})
    return {
        "state.pt": save_torch(state),
        "module.pt": save_torch({"model": module_tree(state), "epoch": 1}),
        "state.safetensors": save(state),
        "state.npz": arrays.getvalue(),
    }


def module_tree(state: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for key, tensor in state.items():
        module = root
        *path, name = key.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(name, nn.Parameter(tensor.clone()))
    return root


def save_torch(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def pick(chance: random.Random, bases: dict[str, bytes], endings: str = "") -> tuple[str, bytes]:
    name = chance.choice([name for name in bases if name.endswith(endings)])
    return name, bases[name]


def flip(chance: random.Random, data: bytes, count: int, low: float = 0.0, high: float = 1.0) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        index = int(chance.uniform(low, high) * (len(data) - 1))
        changed[index] ^= 1 << chance.randrange(8)
    return bytes(changed)


def edit_entry(data: bytes, suffix: str, edit: Callable[[bytes], bytes]) -> bytes:
    """Rewrite a zip file with one entry changed and all checksums right, so that the change gets past them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(stream, "w") as after:
        for info in before.infolist():
            content = before.read(info)
            after.writestr(info.filename, edit(content) if info.filename.endswith(suffix) else content)
    return stream.getvalue()


def truncate(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases)
    return name, data[: chance.randrange(len(data) - 22)]


def flip_anywhere(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases)
    return name, flip(chance, data, chance.randint(1, 8))


def flip_directory(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases)
    low, high = chance.choice([(0.99, 1.0), (0.0, 0.001)])
    return name, flip(chance, data, chance.randint(1, 8), low, high)


def flip_pickle(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases, ".pt")
    return name, edit_entry(data, "data.pkl", lambda content: flip(chance, content, chance.randint(1, 4)))


def splice_pickle(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases, ".pt")

    def splice(content: bytes) -> bytes:
        start, length = chance.randrange(len(content)), chance.randint(1, 200)
        kind = chance.randrange(3)
        if kind == 0:
            return content[:start] + content[start + length :]
        inserted = (
            content[start : start + length] * chance.randint(1, 50) if kind == 1 else chance.randbytes(length)
        )
        return content[:start] + inserted + content[start:]

    return name, edit_entry(data, "data.pkl", splice)


def call(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases, ".pt")
    function = chance.choice(CALLS)
    program = function + b"X\x0e\x00\x00\x00touch executed\x85R0"
    return name, edit_entry(data, "data.pkl", lambda content: content[:2] + program + content[2:])


def wrong_shape(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    state = torch.load(io.BytesIO(bases["state.pt"]), weights_only=True)
    key = chance.choice(list(state))
    shape = list(state[key].shape)
    index = chance.randrange(len(shape))
    shape[index] = max(0, shape[index] + chance.choice([-1, 1, 7, 4 * shape[index]])) or 2 * shape[index]
    state[key] = torch.zeros(shape, dtype=torch.float16)
    return "state.pt", save_torch(state)


def huge_size(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    name, data = pick(chance, bases)
    number = chance.choice(HUGE)
    if name.endswith(".npz"):

        def grow(content: bytes) -> bytes:
            length = struct.unpack("<H", content[8:10])[0]
            header = content[10 : 10 + length].replace(b"(16, 3,", f"({number}, 3,".encode())
            return content[:8] + struct.pack("<H", len(header)) + header + content[10 + length :]

        return name, edit_entry(data, "model.0.conv.weight.npy", grow)
    if name.endswith(".safetensors"):
        kind = chance.randrange(2)
        if kind == 0:
            return name, struct.pack("<Q", min(number, 2**64 - 1)) + data[8:]
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header["model.0.conv.weight"]["shape"] = [number % 2**63, 3, 3, 3]
        text = json.dumps(header).encode()
        return name, struct.pack("<Q", len(text)) + text + data[8 + length :]
    long = number.to_bytes(16, "little")
    replacement = b"\x8a\x10" + long

    def enlarge(content: bytes) -> bytes:
        places = [index for index in range(len(content) - 2) if content[index : index + 1] == b"M"]
        index = chance.choice(places)
        return content[:index] + replacement + content[index + 3 :]

    return name, edit_entry(data, "data.pkl", enlarge)


def cyclic(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    kind = chance.randrange(5)
    if kind == 0:
        model = module_tree({"a.b.weight": torch.zeros(2)})
        owner = chance.choice([model, model.get_submodule("a"), model.get_submodule("a.b")])
        owner._modules["loop"] = model
        return "cyclic.pt", save_torch({"model": model})
    if kind == 1:
        content: dict[str, Any] = {"epoch": 1}
        content[chance.choice(["model", "ema", "state_dict"])] = content
        return "cyclic.pt", save_torch(content)
    if kind == 2:
        depth = chance.randint(1_000, 300_000)
        program = chance.choice([b"]" * depth + b"a" * (depth - 1), b"]" + b"\x85" * depth])
        return "deep.pt", archive_of(b"\x80\x02" + program + b".")
    if kind == 3:  # each list holds the one before it twice: walking them all would never end
        rounds = chance.randint(30, 300)
        program = b"]q\x00" + b"](h\x00h\x00eq\x00" * rounds
        return "laughs.pt", archive_of(b"\x80\x02}X\x05\x00\x00\x00model" + program + b"s.")
    model = nn.Module()
    for _ in range(chance.randint(20, 60)):
        parent = nn.Module()
        parent.add_module("a", model)
        parent.add_module("b", model)
        model = parent
    return "shared.pt", save_torch_shallow(model)


def save_torch_shallow(model: nn.Module) -> bytes:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return save_torch({"model": model})
    finally:
        sys.setrecursionlimit(limit)


def bomb(chance: random.Random, bases: dict[str, bytes]) -> tuple[str, bytes]:
    count = chance.randint(100_000, 700_000)
    one = chance.choice([b"}", b"]", b"\x8f", b"N0", b"2", b"(", b"K\x01\x85", b"cno.such\nName\n)\x81"])
    if chance.random() < 0.3:  # keys whose hashes collide
        keys = b"".join(
            b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(1, count // 10)
        )
        return "keys.pt", archive_of(b"\x80\x02}(" + keys + b"u.")
    return "bomb.pt", archive_of(b"\x80\x02N" + one * (count // len(one)) + b".")


def archive_of(program: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


STRICT: tuple[Mutation, ...] = (truncate, call, wrong_shape, huge_size, cyclic, bomb)
LOOSE: tuple[Mutation, ...] = (flip_anywhere, flip_directory, flip_pickle, splice_pickle)


def run(count: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    bases = make_bases()
    for entry in FAMILIES:
        load_family(entry)  # our own modules, imported when a file is first compared with them
    events: list[str] = []
    watching = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event.startswith(WATCHED_EVENTS):
            events.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(audit)
    outcomes: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    slowest, slowest_kind = 0.0, ""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in bases.items():
            path = Path(folder) / name
            path.write_bytes(data)
            load_detector(path)
            path.write_bytes(data[: len(data) // 2])
            _load(path)
        for index in range(count):
            mutation = (STRICT + LOOSE)[index % len(STRICT + LOOSE)]
            name, data = mutation(chance, bases)
            path = Path(folder) / name
            path.write_bytes(data)
            before = set(Path(folder).iterdir())
            watching, start = True, time.process_time()
            outcome = _load(path)
            seconds, watching = time.process_time() - start, False
            if seconds > slowest:
                slowest, slowest_kind = seconds, mutation.__name__
            outcomes[f"{mutation.__name__}: {outcome.split(':')[0]}"] += 1
            if outcome.startswith("raised") or (outcome == "loaded" and mutation in STRICT):
                problems.append(f"{mutation.__name__} {index}: {outcome}")
            if set(Path(folder).iterdir()) != before:
                problems.append(f"{mutation.__name__} {index}: files changed")
    return {
        "count": count,
        "seed": seed,
        "outcomes": dict(sorted(outcomes.items())),
        "problems": problems,
        "events": sorted(set(events)),
        "slowest_seconds": round(slowest, 3),
        "slowest_kind": slowest_kind,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Largest resident memory of this program; getrusage would count that of the process that started it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def _load(path: Path) -> str:
    try:
        load_detector(path)
    except CheckpointError as error:
        return "refused" if str(error) and len(str(error)) < 4000 else "raised: message of odd length"
    except BaseException as error:  # whatever it is, it is a finding
        return f"raised: {type(error).__name__}: {str(error)[:200]}"
    return "loaded"


if __name__ == "__main__":
    assert pickle.format_version
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
