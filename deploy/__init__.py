"""Export passes per target, graph check, runtimes and benchmark, for any ONNX file."""

from deploy.build import build_engine
from deploy.compare import CompareReport, compare_arrays, compare_outputs, unexplained_variance
from deploy.errors import DeployError
from deploy.export import OPSETS, TARGETS, ExportReport, export_onnx
from deploy.finding import Finding
from deploy.findings import CheckReport, check_graph, inspect_graph
from deploy.fixed_point import FixedPointReport, compare_codes
from deploy.graph import load_onnx, save_onnx, verify_onnx
from deploy.onnx_runtime import ONNXRuntime
from deploy.openvino_runtime import OpenVINORuntime
from deploy.outputs import OUTPUTS, NMSOptions
from deploy.passes import PassCount, count_qdq
from deploy.runtime import Runtime, engine_size
from deploy.tensorrt_builder import BuildOptions
from deploy.tensorrt_runtime import TensorRTRuntime
from deploy.timing import LatencyReport, benchmark, benchmark_alternately

__all__ = [
    "OPSETS",
    "OUTPUTS",
    "TARGETS",
    "BuildOptions",
    "CheckReport",
    "CompareReport",
    "DeployError",
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
    "save_onnx",
    "unexplained_variance",
    "verify_onnx",
]
