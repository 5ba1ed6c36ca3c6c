"""Export passes per target, graph check, runtimes and benchmark, for any ONNX file."""

from core.errors import DeployError
from core.targets import OUTPUTS, TARGETS
from deploy.benchmark.timing import LatencyReport, benchmark, benchmark_alternately
from deploy.check.finding import Finding
from deploy.check.report import CheckReport, check_graph, inspect_graph
from deploy.export import ExportReport, export_onnx
from deploy.graph.model import load_onnx, save_onnx, verify_onnx
from deploy.graph.passes import PassCount, count_qdq
from deploy.parity.codes import FixedPointReport, compare_codes
from deploy.parity.outputs import CompareReport, compare_arrays, compare_outputs, unexplained_variance
from deploy.runtimes.base import EngineRequest, Runtime, engine_size
from deploy.runtimes.engines import build_engine, open_engine
from deploy.runtimes.onnxruntime import ONNXRuntime
from deploy.runtimes.openvino import OpenVINORuntime
from deploy.runtimes.tensorrt import TensorRTRuntime
from deploy.runtimes.tensorrt_builder import BuildOptions
from deploy.targets.outputs import NMSOptions

__all__ = [
    "OUTPUTS",
    "TARGETS",
    "BuildOptions",
    "CheckReport",
    "CompareReport",
    "DeployError",
    "EngineRequest",
    "ExportReport",
    "Finding",
    "FixedPointReport",
    "LatencyReport",
    "NMSOptions",
    "ONNXRuntime",
    "OpenVINORuntime",
    "PassCount",
    "Runtime",
    "TensorRTRuntime",
    "benchmark",
    "benchmark_alternately",
    "build_engine",
    "check_graph",
    "compare_arrays",
    "compare_codes",
    "compare_outputs",
    "count_qdq",
    "engine_size",
    "export_onnx",
    "inspect_graph",
    "load_onnx",
    "open_engine",
    "save_onnx",
    "unexplained_variance",
    "verify_onnx",
]
