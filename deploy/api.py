"""The public names of the package, see `deploy`."""

from core.targets import TARGETS
from deploy.benchmark.timing import LatencyReport, benchmark_alternately
from deploy.check.report import CheckReport, check_graph, inspect_graph
from deploy.check.svg import describe_graph
from deploy.export import ExportReport, export_onnx
from deploy.graph.model import load_onnx, save_onnx, verify_onnx
from deploy.parity.codes import compare_codes
from deploy.parity.outputs import CompareReport, compare_arrays, unexplained_variance
from deploy.runtimes.base import EngineRequest, Runtime, engine_size
from deploy.runtimes.engines import build_engine, open_engine
from deploy.runtimes.onnxruntime import ONNXRuntime
from deploy.runtimes.openvino import OpenVINORuntime
from deploy.targets.outputs import NMSOptions

__all__ = [
    "TARGETS", "CheckReport", "CompareReport", "EngineRequest", "ExportReport", "LatencyReport", "NMSOptions",
    "ONNXRuntime", "OpenVINORuntime", "Runtime", "benchmark_alternately", "build_engine", "check_graph",
    "compare_arrays", "compare_codes", "describe_graph", "engine_size", "export_onnx", "inspect_graph", "load_onnx",
    "open_engine", "save_onnx", "unexplained_variance", "verify_onnx",
]  # fmt: skip
