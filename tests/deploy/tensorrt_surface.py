"""Reads classes, enum members and signatures out of TensorRT's real Python bindings, without TensorRT.

The bindings are small wheels on PyPI. They import once their libraries can be loaded; empty stand-ins with the right
names are enough for that, because nothing is called. `python tests/deploy/tensorrt_surface.py` writes
tensorrt_surface.json anew.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = {
    "8.6.1": "tensorrt-bindings==8.6.1",
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu12-bindings==11.4.0.106",
}
STORED = Path(__file__).with_name("tensorrt_surface.json")
CLASSES = [
    *(
        "ILogger",
        "Builder",
        "INetworkDefinition",
        "IBuilderConfig",
        "IOptimizationProfile",
        "OnnxParser",
        "IHostMemory",
    ),
    *(
        "ITimingCache",
        "Runtime",
        "ICudaEngine",
        "IExecutionContext",
        "EngineInspector",
        "IProfiler",
        "ITensor",
    ),
]
ENUMS = [
    *(
        "ILogger.Severity",
        "NetworkDefinitionCreationFlag",
        "BuilderFlag",
        "MemoryPoolType",
        "ProfilingVerbosity",
    ),
    *("TensorIOMode", "DataType", "LayerInformationFormat"),
]
FUNCTIONS = ["init_libnvinfer_plugins"]

READER = """
import json, sys
import tensorrt_bindings as trt

def signatures(function):
    lines = [line.strip() for line in (function.__doc__ or "").splitlines()]
    found = [line.split(". ", 1)[-1] for line in lines if " -> " in line and "(" in line and "self" in line]
    return found or [line for line in lines if " -> " in line and "(" in line]

def find(path):
    thing = trt
    for part in path.split("."):
        thing = getattr(thing, part)
    return thing

classes, enums, functions = json.loads(sys.argv[1])
surface = {"classes": {}, "enums": {}, "functions": {}}
for name in classes:
    cls = find(name)
    methods, properties, values = {}, {}, []
    for member in dir(cls):
        if member.startswith("_") and member != "__init__" or name == "INetworkDefinition" and member[:4] == "add_":
            continue
        value = getattr(cls, member)
        if isinstance(value, property):
            properties[member] = value.fset is not None
        elif type(value).__name__ == "instancemethod" or callable(value) and not isinstance(value, type):
            methods[member] = signatures(value)
        elif not isinstance(value, type):
            values.append(member)
    surface["classes"][name] = {"methods": methods, "properties": properties, "values": sorted(values)}
for name in enums:
    surface["enums"][name] = {k: int(v) for k, v in find(name).__members__.items()}
for name in functions:
    surface["functions"][name] = signatures(find(name))
print(json.dumps(surface))
"""


def install(version: str, folder: Path) -> Path:
    """Install the bindings of one version; returns the folder to put on PYTHONPATH."""
    target = folder / version
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(target),
        PACKAGES[version],
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    build_stand_ins(target)
    return target


def build_stand_ins(target: Path) -> None:
    """Compile empty libraries under the names the bindings ask for, with the symbols they miss."""
    module = next((target / "tensorrt_bindings").glob("tensorrt*.so"))
    dynamic = subprocess.run(["readelf", "-d", module], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"\[(libnv\w+\.so\.\d+)\]", dynamic)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", module], check=True, capture_output=True, text=True
    ).stdout
    missing = [line.split()[-1] for line in symbols.splitlines()]
    missing = [name for name in missing if "@" not in name and not re.match(r"_?Py|dl|__|_ITM", name)]
    folder = target / "stand_ins"
    folder.mkdir()
    for library in libraries:
        source = folder / f"{library}.c"
        names = missing if library.startswith("libnvinfer.so") else []
        source.write_text(
            "".join(f"void *{name}(void) {{ return 0; }}\n" for name in names) or "int empty;\n"
        )
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{library}",
            "-o",
            str(folder / library),
            str(source),
        ]
        subprocess.run(command, check=True, capture_output=True)


def read(target: Path) -> dict:
    """The surface of installed bindings; values of one class as plain data."""
    command = [sys.executable, "-c", READER, json.dumps([CLASSES, ENUMS, FUNCTIONS])]
    environment = {"PYTHONPATH": str(target), "LD_LIBRARY_PATH": str(target / "stand_ins")}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    text = re.sub(
        r"(tensorrt_bindings\.tensorrt|nvinfer1|nvonnxparser)(\.|::)", "", result.stdout.splitlines()[-1]
    )
    return json.loads(text)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        surfaces = {version: read(install(version, Path(folder))) for version in PACKAGES}
    STORED.write_text(json.dumps(surfaces, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
