"""Settings: placements, a run's configuration, trees of `--config-dir`, GPUs, overrides."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.fuzzing.mutations import ODD, Read, as_text, mutate_bytes, to_yaml
from configs.compose import compose, read
from deploy.autotune.gpus import load_gpus
from quant import load_placement


def make_placement(chance: random.Random, folder: Path) -> Read:
    """A placement file, edited by hand."""
    group = {
        "name": "a", "tensors": [{"name": "a", "node": "a", "users": ["conv"]}], "layers": ["conv"], "observer": None,
        "scale": 0.1, "bits": 8, "signed": True,
    }  # fmt: skip
    weights = [{"layer": "conv", "axis": 0, "group": "a", "bits": 8}]
    matmuls = [{"name": "m", "node": "m", "groups": ["a", "a"]}]
    content = {
        "groups": [group], "weights": weights, "kept_float": {"x": "policy"}, "concats": {"c": True},
        "matmuls": matmuls,
    }  # fmt: skip
    path = folder / "placement.yaml"
    path.write_bytes(as_text(chance, content, to_yaml))
    return lambda: load_placement(path)


def make_run_config(chance: random.Random, folder: Path) -> Read:
    """The config.yaml of a run directory."""
    content = {
        "experiment": "x", "weights": "w.pt", "seed": 3, "stages": ["float"],
        "data": {"root": "d", "image_size": [64, 64]},
        "model": {"name": "custom", "factory": None}, "quant": {"policy": [{"match": "a", "bits": 4}]}, "trust": False,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_bytes(as_text(chance, content, to_yaml))
    return lambda: read(path)


def make_config_dir(chance: random.Random, folder: Path) -> Read:
    """An experiment in a tree of `--config-dir`."""
    content = {
        "defaults": ["demo", "_self_"], "experiment": "mine", "seed": 3, "hydra": {"sweep": {"dir": "x"}},
        "data": {"synthetic": {"size": 64}}, "quant": {"policy": [{"match": "*", "keep_float": True}]},
    }  # fmt: skip
    path = folder / "experiment" / "mine.yaml"
    path.parent.mkdir()
    path.write_bytes(b"# @package _global_\n" + as_text(chance, content, to_yaml))
    return lambda: compose(["+experiment=mine"], [folder])


def make_gpus(chance: random.Random, folder: Path) -> Read:
    """A file of GPUs."""
    entry = {
        "title": "X", "capability": "SM89", "gigabytes_per_second": 300, "kernel_microseconds": 2.0, "source": "here",
        "teraops": {"fp16": 100, "int8": 200, "fp8": 200},
    }  # fmt: skip
    path = folder / "gpus.yaml"
    path.write_bytes(as_text(chance, {"x": entry}, to_yaml))
    return lambda: load_gpus(path)


def make_overrides(chance: random.Random, folder: Path) -> Read:
    """Overrides of the command line."""
    texts = [
        "seed=3", "data.image_size=[64,64]", "quant.policy=[{match: a, bits: 4}]", "model.factory=mine.py:build",
        "stages=[float]",
        "data.merge_classes={a: [b]}", "+data.merge_classes.x=[1]", "run_dir=x", "model=yolov9t", "deploy=trt10",
        "data.workers=2",
    ]  # fmt: skip
    chosen = chance.sample(texts, chance.randint(1, 3))
    index = chance.randrange(len(chosen))
    if chance.random() < 0.5:
        key = chosen[index].split("=")[0]
        odd = chance.choice(ODD)
        chosen[index] = f"{key}={odd if not isinstance(odd, int) or abs(odd) < 10**99 else '9' * 5000}"
    else:
        chosen[index] = mutate_bytes(chance, chosen[index].encode()).decode("utf-8", "replace")[:6000]
    return lambda: compose(["+experiment=demo", *chosen])
