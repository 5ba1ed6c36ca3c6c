"""A TensorRT module made from the real signatures of one version: it refuses what the real one would refuse, and
keeps a log.

Every class, method, property, enum member and parameter comes from tensorrt_surface.json. A call with a wrong name,
a wrong number of arguments, an unknown keyword or an argument of a wrong type raises, as in pybind11. What calls
return is made up here: one image input, one output, a plan of a few bytes.
"""

import enum
import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch

SURFACE = json.loads(Path(__file__).with_name("tensorrt_surface.json").read_text())
PLAN = b"a plan of the double"
TIMINGS = b"timings of the double"
SIMPLE = {"int": int, "typing.SupportsInt": int, "float": (int, float), "str": str, "bool": bool}
SEQUENCES = {"Dims": (tuple, list), "tuple": tuple, "list": list}
BUFFERS = {"buffer", "typing_extensions.Buffer"}


def parse(signature):
    """(parameters [(name, type, is optional)], return type) of "f(self: A, x: B = 1) -> C"."""
    inner, returns = re.match(r"\w+\((.*)\) -> (.*)$", signature).groups()
    parameters, depth, part = [], 0, ""
    for character in inner + ",":
        depth += (character in "[(<" and 1) or (character in "])>" and -1) or 0
        if character == "," and depth == 0:
            parameters.append(part.strip())
            part = ""
        else:
            part += character
    result = []
    for text in filter(None, parameters):
        name, _, rest = text.partition(":")
        kind, equals, _ = rest.partition("=")
        if name != "self":
            result.append((name.strip(), kind.strip(), bool(equals)))
    return result, returns


class Double:
    """`Double("10.3.0").module` stands for `import tensorrt`."""

    def __init__(
        self, version, input_shape=(-1, 3, 64, 96), refuse_plan=False, refuse_parse=False, output_shape=None
    ):
        self.version, self.surface = version, SURFACE[version]
        self.log = []
        self.input_shape, self.output_shape = input_shape, output_shape
        self.refuse_plan, self.refuse_parse = refuse_plan, refuse_parse
        self.profiles, self.flags, self.classes = [], [], {}
        self.module = SimpleNamespace(__version__=version)
        for name, members in self.surface["enums"].items():
            self._put(name, enum.IntEnum(name.rsplit(".")[-1], members)) if "." not in name else None
        for name, members in self.surface["classes"].items():
            self.classes[name] = self._make_class(name, members)
            self._put(name, self.classes[name])
        severity = enum.IntEnum("Severity", self.surface["enums"]["ILogger.Severity"])
        self.classes["ILogger"].Severity = severity
        for value in severity:
            setattr(self.classes["ILogger"], value.name, value)
        for name, signatures in self.surface["functions"].items():
            setattr(self.module, name, self._make_function(name, name, signatures))

    def _put(self, name, value):
        setattr(self.module, name, value)

    def called(self, name):
        return [arguments for called, arguments in self.log if called == name]

    # ------------------------------------------------------------------------------------------------- construction
    def _make_class(self, name, members):
        double = self
        initial = members["methods"].get("__init__", [])

        def initialize(instance, *args, **kwargs):
            if not initial:
                raise TypeError(f"{name}: No constructor defined!")
            double._check(f"{name}.__init__", initial, args, kwargs)
            object.__setattr__(instance, "_values", {})

        def set_attribute(instance, attribute, value):
            if attribute in members["properties"]:
                if not members["properties"][attribute]:
                    raise AttributeError(f"property '{attribute}' of '{name}' object has no setter")
                double.log.append((f"{name}.{attribute}=", value))
                instance._values[attribute] = value
            elif type(instance) is cls:
                raise AttributeError(f"'{name}' object has no attribute '{attribute}'")
            else:
                object.__setattr__(instance, attribute, value)

        body = {"__init__": initialize, "__setattr__": set_attribute}
        for method, signatures in members["methods"].items():
            if method != "__init__":
                body[method] = self._make_function(f"{name}.{method}", method, signatures, bound=True)
        for attribute in members["properties"]:
            body[attribute] = property(lambda instance, key=attribute: double._get(name, instance, key))
        if name == "IHostMemory":
            body["__buffer__"] = lambda instance, flags: memoryview(instance._values["content"])
        cls = type(name, (), body)
        return cls

    def _make_function(self, path, name, signatures, bound=False):
        def call(*args, **kwargs):
            instance, args = (args[0], args[1:]) if bound else (None, args)
            values, returns = self._check(path, signatures, args, kwargs)
            self.log.append((path, values))
            return self._answer(path, instance, values, returns)

        return call

    def _check(self, path, signatures, args, kwargs):
        reasons = []
        for signature in signatures:
            parameters, returns = parse(signature)
            names = [name for name, _, _ in parameters]
            if len(args) > len(names) or set(kwargs) - set(names) or set(names[: len(args)]) & set(kwargs):
                reasons.append(signature)
                continue
            values = dict(zip(names, args, strict=False)) | kwargs
            missing = [name for name, _, optional in parameters if not optional and name not in values]
            wrong = [
                name for name, kind, _ in parameters if name in values and not self._fits(values[name], kind)
            ]
            if not missing and not wrong:
                return values, returns
            reasons.append(f"{signature}: missing {missing}, wrong type {wrong}")
        raise TypeError(f"{path}(): incompatible function arguments. {reasons}; invoked with {args} {kwargs}")

    def _fits(self, value, kind):
        if kind in SIMPLE:
            return isinstance(value, SIMPLE[kind]) and (kind == "bool") == isinstance(value, bool)
        if kind in SEQUENCES:
            return isinstance(value, SEQUENCES[kind])
        if kind in BUFFERS:
            return isinstance(value, bytes | bytearray | memoryview)
        if kind in self.classes:
            return isinstance(value, self.classes[kind])
        enumeration = getattr(self.module, kind, None)
        return not (isinstance(enumeration, type) and issubclass(enumeration, enum.Enum)) or isinstance(
            value, enumeration
        )

    def new(self, name, **values):
        instance = object.__new__(self.classes[name])
        object.__setattr__(instance, "_values", values)
        return instance

    # ------------------------------------------------------------------------------------------------------- answers
    def _answer(self, path, instance, values, returns):
        special = getattr(self, "answer_" + path.rsplit(".", 1)[-1], None)
        if special is not None:
            return special(instance, values)
        if returns in self.classes or returns == "IEngineInspector":  # its C++ name, in the signatures of 8.6
            return self.new({"IEngineInspector": "EngineInspector"}.get(returns, returns))
        return {"bool": True, "int": 0, "str": "", "None": None}.get(returns)

    def _get(self, name, instance, key):
        known = {
            ("INetworkDefinition", "num_inputs"): 1,
            ("OnnxParser", "num_errors"): 2,
            ("ICudaEngine", "num_io_tensors"): 2,
            ("ITensor", "name"): "images",
            ("ITensor", "shape"): self.input_shape,
        }
        return instance._values[key] if key in instance._values else known[name, key]

    def answer_get_input(self, instance, values):
        return self.new("ITensor")

    def answer_parse(self, instance, values):
        return not self.refuse_parse

    def answer_get_error(self, instance, values):
        return f"parser error {values['index']}"

    def answer_build_serialized_network(self, instance, values):
        return None if self.refuse_plan else BufferedMemory(PLAN)

    def answer_serialize(self, instance, values):
        return BufferedMemory(TIMINGS)

    def answer_get_timing_cache(self, instance, values):
        return self.new("ITimingCache")

    def answer_deserialize_cuda_engine(self, instance, values):
        return self.new("ICudaEngine") if bytes(values["serialized_engine"]) == PLAN else None

    def answer_get_tensor_name(self, instance, values):
        return ["images", "output0"][values["index"]]

    def answer_get_tensor_mode(self, instance, values):
        return getattr(self.module.TensorIOMode, "INPUT" if values["name"] == "images" else "OUTPUT")

    def answer_get_tensor_dtype(self, instance, values):
        return self.module.DataType.FLOAT

    def answer_get_tensor_profile_shape(self, instance, values):
        return [(1, 3, 64, 96), (1, 3, 64, 96), (16, 3, 64, 96)]

    def answer_create_execution_context(self, instance, values):
        return self.new("IExecutionContext", addresses={}, shapes={})

    def answer_set_input_shape(self, instance, values):
        fits = values["shape"][0] <= 16
        if fits:
            instance._values["shapes"][values["name"]] = tuple(values["shape"])
        return fits

    def answer_get_tensor_shape(self, instance, values):
        if self.output_shape is not None:
            return self.output_shape
        return (instance._values["shapes"]["images"][0], 7, 126)

    def answer_set_tensor_address(self, instance, values):
        instance._values["addresses"][values["name"]] = values["memory"]
        return True

    def answer_execute_async_v3(self, instance, values):
        if set(instance._values["addresses"]) != {"images", "output0"}:
            return False  # the real one fails when an address is missing
        profiler = instance._values.get("profiler")
        if profiler is not None:
            profiler.report_layer_time("conv", 0.5)
        return True

    def answer_get_engine_information(self, instance, values):
        key = "I/O Tensors" if self.version.startswith("11") else "Bindings"
        return json.dumps({"Layers": [{"Name": "conv"}], key: ["images", "output0"]})


class BufferedMemory(bytearray):
    """Stands for IHostMemory, which has the buffer protocol; classes written in Python have it from 3.12 on only."""


class HostDevice:
    """The runtime's device without a GPU: tensors on the CPU, a stream handle, captures that replay."""

    name = "cpu"

    def __init__(self):
        self.captured = 0

    def empty(self, shape, dtype):
        return torch.zeros(tuple(shape), dtype=dtype)

    def stream(self):
        return 1234

    def synchronize(self):
        pass

    def capture(self, context):
        self.captured += 1
        context.execute_async_v3(self.stream())
        device = self

        class Graph:
            replays = 0

            def replay(self):
                Graph.replays += 1

        device.graph = Graph
        return Graph()
