"""Limits of single settings and of their combinations, checked before anything is loaded.

Hydra and OmegaConf check names and types. What they cannot know (a size must be divisible by the coarsest
stride, a stage list needs a known order) is checked here, on the typed dataclass, and reported all at once.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from configs.deploy_schema import DeployConfig
from configs.quant_schema import PolicyRule
from configs.schema import STAGES, Config
from core.choices import AUTO, FP8, FP8_CAPABILITIES
from core.documents import shown
from core.errors import ConfigError
from core.names import address_remedy, closest, is_address
from core.runtimes import RUNTIMES, RuntimeEntry
from core.targets import TARGETS

MAX_PROBLEMS = 20  # in one message


def validate(config: Any) -> None:
    """Raise ConfigError with one line per problem of a `Config` or `ExportConfig` instance."""
    if isinstance(config, Config):
        for index, rule in enumerate(config.quant.policy):
            if not isinstance(rule, PolicyRule):
                raise ConfigError(
                    f"quant.policy[{index}]={rule}: expected a rule; write quant.policy='[{{match: NAME, keep_float: "
                    "true}]'."
                )
    problems = _field_problems(config, "") + device_problems(config.device)
    if isinstance(config, Config):
        problems += (
            _address_problems(config)
            + _combination_problems(config)
            + _quant_problems(config)
            + _deploy_problems(config)
        )
    if problems:
        raise ConfigError("\n".join(list(dict.fromkeys(problems))[:MAX_PROBLEMS]))


def device_problems(device: str) -> list[str]:
    """Check the name of a device; whether this machine has it is another question."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        return []
    reason = ": Apple's GPUs are not supported" if device == "mps" else ""
    return [f"device={device}{reason}: expected auto, cpu, cuda or cuda:N; use device=auto."]


def _address_problems(config: Config) -> list[str]:
    """Refuse addresses where a file or folder is expected."""
    paths = {
        "weights": config.weights,
        "data.root": config.data.root,
        "quant.placement": config.quant.placement,
        "run_dir": config.run_dir,
    }
    return [f"{key}: {address_remedy(path)}." for key, path in paths.items() if path and is_address(path)]


def _field_problems(node: Any, prefix: str) -> list[str]:
    """Check every field of a dataclass instance against its metadata, depth first."""
    problems: list[str] = []
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{prefix}{field.name}"
        if field.metadata.get("is_size"):
            problems += _size_problems(value, name, field.metadata)
        elif dataclasses.is_dataclass(value):
            problems += _field_problems(value, f"{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    problems += _field_problems(item, f"{name}[{index}].")
                else:
                    problems += _value_problems(item, name, field.metadata)
        elif value is not None:
            problems += _value_problems(value, name, field.metadata)
    return problems


def _value_problems(value: Any, name: str, limits: Any) -> list[str]:
    """Check one value; an empty list means that it is fine."""
    choices = limits.get("choices", ())
    if choices and value not in choices:
        near = closest(str(value), choices)
        hint = f" (closest: {near})" if near else ""
        return [f"{name}={value}: expected one of {', '.join(choices)}{hint}."]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    minimum, maximum, above = (limits.get(key) for key in ("minimum", "maximum", "above"))
    unit = f" {limits['unit']}" if limits.get("unit") else ""
    if value != value or (minimum is not None and value < minimum):
        return [f"{name}={value}: expected at least {minimum}{unit}; set {name}={minimum} or more."]
    if above is not None and value <= above:
        return [f"{name}={value}: expected more than {above}{unit}; choose a larger value."]
    if maximum is not None and value > maximum:
        return [f"{name}={value}: expected at most {maximum}{unit}; set {name}={maximum} or less."]
    multiple = limits.get("multiple")
    if multiple and value % multiple:
        below, beyond = value // multiple * multiple, (value // multiple + 1) * multiple
        remedy = f"{name}={below} or {name}={beyond}" if below else f"{name}={beyond}"
        return [
            f"{name}={value}: expected a multiple of {multiple}{unit} (the coarsest stride); use {remedy}."
        ]
    return []


def _size_problems(value: Any, name: str, limits: Any) -> list[str]:
    """Check an image size: one number, or [height, width]."""
    sides = value if isinstance(value, list) else [value]
    if not 1 <= len(sides) <= 2 or any(type(side) is not int for side in sides):
        return [
            f"{name}={value}: expected one number of {limits['unit']} for a square, or [height, width]; use "
            f"{name}=640 or {name}=[384,640]."
        ]
    if len(sides) == 1 or sides[0] == sides[1]:
        return _value_problems(sides[0], name, limits)
    least, most, multiple = limits["minimum"], limits["maximum"], limits["multiple"]
    nearest = [min(most, max(least, (side + multiple // 2) // multiple * multiple)) for side in sides]
    if nearest == sides:
        return []
    return [
        f"{name}={value}: expected a height and a width of at least {least} and at most {most} {limits['unit']}, each "
        f"a multiple of {multiple} (the coarsest stride); use {name}=[{nearest[0]},{nearest[1]}]."
    ]


def _combination_problems(config: Config) -> list[str]:
    """Check what only several settings together can get wrong."""
    problems: list[str] = []
    if not all(isinstance(stage, str) for stage in config.stages):
        return [f"stages={shown(config.stages)}: expected names of stages."]
    if not config.stages:
        problems.append(f"stages=[]: expected at least one stage; choose from {', '.join(STAGES)}.")
    repeated = sorted({stage for stage in config.stages if config.stages.count(stage) > 1})
    if repeated:
        problems.append(f"stages names {', '.join(repeated)} more than once; name each stage once.")
    order = [stage for stage in STAGES if stage in config.stages]
    if not repeated and set(config.stages) <= set(STAGES) and config.stages != order:
        problems.append(
            f"stages={config.stages}: expected the order of the job; use stages=[{','.join(order)}]."
        )
    if config.data.kind == "folder" and config.data.root is None and config.data.factory is None:
        problems.append(
            "data.root is not set: expected the folder of a dataset; add data.root=PATH or data=synthetic."
        )
    if config.model.name == "custom" and config.model.factory is None:
        problems.append("model=custom without a factory; add model.factory=path/to/file.py:function.")
    for name, factory in (
        ("model.factory", config.model.factory),
        ("data.factory", config.data.factory),
        ("metric.factory", config.metric.factory),
    ):
        if factory is not None and not re.fullmatch(r"([\w.]+|.+\.py):\w+", factory):
            problems.append(
                f"{name}={factory}: expected path/to/file.py:function or package.module:function."
            )
        elif name == "model.factory" and factory is not None and config.model.name != "custom":
            problems.append(f"{name}={factory} with model.name={config.model.name}: add model=custom.")
    if config.qat.validate_images == 0 and (config.qat.select == "best" or config.qat.patience is not None):
        problems.append(
            "qat.validate_images=0: qat.select=best and qat.patience look at the validation of every epoch; use "
            "qat.select=last without patience, or validate some images."
        )
    if config.model.name == "auto" and config.weights is None:
        problems.append(
            "model.name=auto without weights: nothing to recognise; add weights=FILE or model=yolov9t."
        )
    return problems


def _quant_problems(config: Config) -> list[str]:
    """Check that a budget and autotune have scores to work from, and that FP8 is used as it can be."""
    problems: list[str] = []
    budget, quant = config.quant.accuracy_budget, config.quant
    if budget is not None and config.sensitivity.method == "none":
        problems.append(
            f"quant.accuracy_budget={budget} with sensitivity.method=none: the budget needs a ranking; use "
            "sensitivity.method=fisher."
        )
    if "autotune" in config.stages and config.sensitivity.method == "none":
        problems.append(
            "the stage autotune with sensitivity.method=none: it needs scores; use sensitivity.method=fisher."
        )
    if quant.swap_activation is not None and config.qat.both_heads:
        problems.append(
            f"quant.swap_activation={quant.swap_activation} with qat.both_heads=true: "
            "the other head keeps SiLU; use qat.both_heads=false."
        )
    if (
        quant.swap_activation == AUTO
        and {"place", "calibrate"} & {*config.stages}
        and "finetune" not in config.stages
    ):
        problems.append(
            f"quant.swap_activation=auto with stages=[{','.join(config.stages)}]: it chooses an activation to "
            "fine-tune with; add finetune to stages, or leave the setting out."
        )
    if quant.grid == FP8:
        problems += [
            f"quant.{name}.bits={part.bits} with quant.grid=fp8: FP8 has 8 bits; use quant.{name}.bits=8."
            for name, part in (("weights", quant.weights), ("activations", quant.activations))
            if part.bits != 8
        ]
        if quant.observer == "entropy":
            problems.append(
                "quant.observer=entropy with quant.grid=fp8: entropy needs steps of equal size; use quant.observer=mse."
            )
        if quant.greedy_rounding:
            problems.append(
                "quant.greedy_rounding=true with quant.grid=fp8: it rounds integers; use quant.greedy_rounding=false."
            )
    return problems


def _deploy_problems(config: Config) -> list[str]:
    """Check that the graph's outputs and target are what the runtimes can use."""
    deploy = config.deploy
    problems: list[str] = []
    if deploy.target not in TARGETS or not set(deploy.runtimes) <= set(RUNTIMES):
        return problems  # reported before, as values that are not a choice
    if deploy.outputs not in TARGETS[deploy.target].outputs:
        able = [f"deploy={name}" for name, target in TARGETS.items() if deploy.outputs in target.outputs]
        problems.append(
            f"deploy.outputs={deploy.outputs}: graphs for {deploy.target} cannot have it; use {' or '.join(able)}, or "
            f"one of deploy.outputs={', '.join(TARGETS[deploy.target].outputs)}."
        )
    kinds = {config.quant.grid, *(rule.grid for rule in config.quant.policy)}
    unable = [name for name in deploy.compute_capabilities if name not in FP8_CAPABILITIES]
    if FP8 in kinds and unable and "tensorrt_rtx" in deploy.runtimes and "engine" in config.stages:
        problems.append(
            f"deploy.compute_capabilities names {', '.join(unable)}, without FP8; with grid=fp8 use "
            f"deploy.compute_capabilities=[{','.join(FP8_CAPABILITIES)}]."
        )
    runtimes = [RUNTIMES[name] for name in deploy.runtimes]
    graphs = {deploy.target, *(runtime.target_for(deploy.target) for runtime in runtimes)}
    if config.quant.swap_activation == "hardswish" and any(
        TARGETS[name].result_quantizers for name in graphs
    ):
        problems.append(
            "quant.swap_activation=hardswish with ONNX Runtime, which has no integer kernel for it and would run the "
            "convolutions in float; use quant.swap_activation=relu."
        )
    for runtime in runtimes:
        problems += _runtime_problems(deploy, runtime)
    if deploy.outputs == "raw" and config.model.factory is not None:
        problems.append(
            "deploy.outputs=raw with a network of your own: its level maps are not known; use deploy.outputs=decoded."
        )
    return problems


def _runtime_problems(deploy: DeployConfig, runtime: RuntimeEntry) -> list[str]:
    """Check that one runtime takes the target, the float precisions and the form of the outputs."""
    problems: list[str] = []
    name = runtime.name
    targets = " or ".join(runtime.targets)
    if len(runtime.targets) > 1 and deploy.target not in runtime.targets:
        problems.append(
            f"deploy.runtimes names {name}, but deploy.target={deploy.target}: expected {targets}; "
            f"deploy={runtime.targets[0]} sets both."
        )
    unknown = [p for p in runtime.float_engines(deploy.float_precisions) if p not in runtime.float_precisions]
    if unknown:
        problems.append(
            f"deploy.float_precisions=[{', '.join(unknown)}] with {name}: expected "
            f"{' or '.join(sorted(runtime.float_precisions))}."
        )
    if deploy.outputs not in runtime.outputs:
        problems.append(
            f"deploy.outputs={deploy.outputs} with {name}: expected "
            f"{' or '.join(f'deploy.outputs={form}' for form in runtime.outputs)}."
        )
    return problems
