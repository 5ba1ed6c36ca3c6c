"""What plans cost: estimated for a GPU from the kernels of a build, or measured with a runtime of this machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from core.choices import FP8, INT8
from core.errors import DeployError
from core.runtimes import RUNTIMES
from deploy import EngineRequest, Runtime, benchmark_alternately, build_engine, open_engine
from deploy.autotune.blocks import Blocks, find_blocks
from deploy.autotune.gpus import GPU, load_gpus
from deploy.autotune.measure import measure_blocks
from deploy.autotune.roofline import count_products, estimate_blocks
from deploy.compile.compiler import compile_graph, import_tensorrt_rtx
from deploy.compile.kernels import Kernel
from deploy.compile.report import fixed_shapes, layer_precisions
from deploy.graph.view import View
from deploy.runtimes.engines import runtime_class
from pipeline.job import Job
from pipeline.run.files import target_of
from pipeline.run.progress import track
from pipeline.stages.plans import FLOATING, Plans

ESTIMATED_TARGET = "tensorrt_rtx"
TIMED = ("openvino", "tensorrt", "tensorrt_rtx")  # runtimes whose layers' times can be told apart by block

Costs = dict[str, float]  # block -> milliseconds


@dataclass(frozen=True)
class Built:
    """An engine of a plan.

    Attributes:
        milliseconds: latency, estimated or measured.
        layers: layer -> precision that it runs in, such as `fp8` or `fp16`; None if the builder does not report it.
    """

    milliseconds: float
    layers: Mapping[str, str] | None = None


class Pricing(ABC):
    """A way to learn what plans cost.

    Attributes:
        target: what graphs are exported for.
        kind: `estimated` or `measured`.
        subject: the GPU or runtime, for messages.
        precisions: quantized precisions that it has costs for.
    """

    target: str
    kind: str
    subject: str
    precisions: tuple[str, ...]

    @abstractmethod
    def price(
        self, plans: Plans, wanted: Sequence[Mapping[str, str]], blocks: Blocks, folder: Path
    ) -> list[Costs]:
        """Milliseconds of every block, for each of some plans."""

    @abstractmethod
    def confirm(
        self, plans: Plans, wanted: Sequence[Mapping[str, str]], blocks: Blocks, folder: Path
    ) -> list[Built]:
        """Whole engines, built anew, for each of some plans."""

    def blocks(self, plans: Plans, folder: Path) -> Blocks:
        """Blocks of the network, from the graph in which every unit is quantized."""
        return find_blocks(plans.write(plans.own, self.target, folder / "blocks.onnx"), plans.tensors)


@dataclass(frozen=True)
class Build:
    """What a compiled plan consists of: kernels, multiply-accumulates by kernel, precision of each layer."""

    kernels: Sequence[Kernel]
    products: Mapping[str, int]
    layers: Mapping[str, str]


class EstimatedPricing(Pricing):
    """Graphs compiled by TensorRT for RTX, their kernels priced for a GPU that need not be here."""

    target, kind = ESTIMATED_TARGET, "estimated"

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self.subject = gpu.title
        self.precisions = tuple(name for name in (INT8, FP8) if name in gpu.teraops)
        self.builds: dict[tuple[str, ...], Build] = {}  # by precisions of units

    def price(
        self, plans: Plans, wanted: Sequence[Mapping[str, str]], blocks: Blocks, folder: Path
    ) -> list[Costs]:
        """See `Pricing.price`."""

        def prices() -> Iterator[Costs]:
            for plan in wanted:
                build = self.build(plans, plan, folder)
                yield estimate_blocks(build.kernels, build.products, blocks, self.gpu)

        return list(track(prices(), f"compile for {self.gpu.capability}", len(wanted)))

    def confirm(
        self, plans: Plans, wanted: Sequence[Mapping[str, str]], blocks: Blocks, folder: Path
    ) -> list[Built]:
        """See `Pricing.confirm`; still an estimate, of the kernels that the plan really has."""
        times = [sum(costs.values()) for costs in self.price(plans, wanted, blocks, folder)]
        return [
            Built(milliseconds, self.build(plans, plan, folder).layers)
            for milliseconds, plan in zip(times, wanted, strict=True)
        ]

    def build(self, plans: Plans, plan: Mapping[str, str], folder: Path) -> Build:
        """Compile a plan, once."""
        key = tuple(plan[unit] for unit in plans.units)
        if key not in self.builds:
            model = plans.write(plan, self.target, folder / "plan.onnx")
            shapes = fixed_shapes(View(model))
            kernels = compile_graph(model, [self.gpu.capability], shapes).kernels
            products, layers = count_products(model, kernels), layer_precisions(model, kernels)
            self.builds[key] = Build(kernels, products, layers)
        return self.builds[key]


class MeasuredPricing(Pricing):
    """Engines of a runtime on this machine, timed by layer."""

    kind, precisions = "measured", (INT8,)

    def __init__(self, job: Job, runtime: str) -> None:
        self.job = job
        self.entry = RUNTIMES[runtime]
        self.target = target_of(job.config, runtime)
        self.subject = f"{self.entry.title} on this machine"
        is_chosen_late = not self.entry.fixes_precision
        self.float_precision = (
            job.config.deploy.int8_hint if is_chosen_late else self.entry.float_precisions[-1]
        )

    def price(
        self, plans: Plans, wanted: Sequence[Mapping[str, str]], blocks: Blocks, folder: Path
    ) -> list[Costs]:
        """See `Pricing.price`; the engines run alternately."""
        with ExitStack() as stack:
            engines = self.engines(plans, wanted, folder, stack, is_profiled=True)
            return measure_blocks(engines, self.shape, self.job.config.autotune.seconds, blocks)

    def confirm(
        self, plans: Plans, wanted: Sequence[Mapping[str, str]], blocks: Blocks, folder: Path
    ) -> list[Built]:
        """See `Pricing.confirm`: median times of whole calls, the engines alternately, without counters."""
        with ExitStack() as stack:
            engines = self.engines(plans, wanted, folder, stack)
            reports = benchmark_alternately(engines, self.shape, self.job.config.autotune.seconds)
        return [Built(report.median_ms) for report in reports]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the images."""
        return (self.job.config.deploy.batch, 3, *self.job.config.data.input_size)

    def engines(
        self,
        plans: Plans,
        wanted: Sequence[Mapping[str, str]],
        folder: Path,
        stack: ExitStack,
        is_profiled: bool = False,
    ) -> list[Runtime]:
        """Build and open an engine for each plan; the stack closes them."""
        config = self.job.config.deploy

        def opened() -> Iterator[Runtime]:
            for index, plan in enumerate(wanted):
                path = folder / f"plan-{index}.onnx"
                plans.write(plan, self.target, path)
                is_float = set(plan.values()) == {FLOATING}
                request = EngineRequest(
                    precision=self.float_precision if is_float else INT8,
                    int8_hint=config.int8_hint,
                    batch=config.batch,
                    image_size=self.job.config.data.input_size,
                    threads=config.threads or None,
                    profile=folder / f"profile-{index}" if is_profiled else None,
                )
                if not self.entry.reads_onnx:
                    path = build_engine(self.entry.name, path, folder / f"engine-{index}", request)
                yield stack.enter_context(open_engine(self.entry.name, path, request))

        return list(track(opened(), f"engines of {self.entry.title}", len(wanted)))


def choose_pricing(job: Job) -> Pricing:
    """The pricing that the settings ask for.

    Raises:
        ConfigError: `autotune.gpu` names no GPU of the file, or the file cannot be used.
        DeployError: what it needs is not installed, or the runtime reports no times that belong to blocks.
    """
    config = job.config.autotune
    if config.gpu is not None:
        gpu = load_gpus(Path(config.gpu_file) if config.gpu_file else None)[config.gpu]
        import_tensorrt_rtx()
        return EstimatedPricing(gpu)
    runtime = job.config.deploy.runtimes[0]
    if runtime not in TIMED or not runtime_class(runtime).can_run():
        reason = "cannot run here" if runtime in TIMED else "does not report times by layer of the graph"
        raise DeployError(
            f"autotune has no costs for {RUNTIMES[runtime].title}, which {reason}: set autotune.gpu to estimate those "
            f"of a GPU ({', '.join(load_gpus())}), or put one of {', '.join(TIMED)} first in deploy.runtimes."
        )
    return MeasuredPricing(job, runtime)
