"""What a user's factories may return, and what each mistake is told."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import CheckpointError, ConfigError, DataError
from core.image_size import ImageSize
from core.rows import PTQ, ResultRow
from data import Batch, Sample
from pipeline import CustomDetector
from pipeline.evaluation.measuring import CustomMetrics, measure_custom, row_figures
from pipeline.user_code.dataset import open_own
from pipeline.user_code.factories import load_factory
from pipeline.user_code.network import CustomModel, load_state

NAMES = ("cat", "dog")
HERE = f"{__name__}:"


class Network(nn.Module):
    """One level of stride 8 in Octet's map format, with a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.box, self.cls = nn.Conv2d(8, 64, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        x = self.stem(images)
        return ((self.box(x), self.cls(x)),)


class Decode(nn.Module):
    """Own maps to anything that `function` makes of [2, 6, A]."""

    def __init__(self, function: Callable[[Tensor], Any] = lambda decoded: decoded) -> None:
        super().__init__()
        self.function = function

    def forward(self, maps: Any) -> Any:
        return self.function(torch.cat([maps[0][0][:, :4], maps[0][1].sigmoid()], dim=1).flatten(2))


class Restless(Network):
    """Draws random numbers in evaluation mode."""

    def forward(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        return super().forward(images + torch.rand(1))


def own_loss(maps: Any, targets: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    return {"all": maps[0][0].square().mean()}


GOOD = CustomDetector(Network(), strides=(8,))
OWN = CustomDetector(Network(), Decode(), own_loss)


def model_of(monkeypatch: pytest.MonkeyPatch, result: Any) -> CustomModel:
    def factory(names: tuple[str, ...]) -> Any:
        return result(names) if callable(result) and not isinstance(result, nn.Module) else result

    monkeypatch.setattr(sys.modules[__name__], "factory", factory, raising=False)
    return CustomModel(f"{HERE}factory", NAMES, ImageSize(64, 64))


@pytest.mark.parametrize("parts", [GOOD, OWN])
def test_good_parts_make_a_detector(monkeypatch: pytest.MonkeyPatch, parts: CustomDetector) -> None:
    detector = model_of(monkeypatch, parts).initial(None)
    decoded = detector.eval()(torch.rand(3, 3, 64, 64))
    assert decoded.shape == (3, 6, 64)
    assert detector.names == NAMES


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Network(), ["a Network", "CustomDetector("]),
        (lambda names: 1 / 0, ["the call failed at", "test_custom.py", "ZeroDivisionError"]),
        (lambda names: CustomDetector(), ["missing", "network"]),
        (dataclasses.replace(OWN, network=own_loss), ["network is", "torch.nn.Module"]),
        (dataclasses.replace(OWN, decode=own_loss), ["decode is", "torch.nn.Module"]),
        (dataclasses.replace(OWN, loss=3), ["loss is a int"]),
        (dataclasses.replace(OWN, loss=None), ["loss is missing"]),
        (CustomDetector(Network()), ["strides are needed"]),
        (dataclasses.replace(GOOD, names=("cat", "cow")), ["cat, cow", "cat, dog", "merge_classes"]),
        (dataclasses.replace(GOOD, network=Restless()), ["does not compute the same"]),
        (dataclasses.replace(OWN, decode=Decode(lambda x: x[:, :5])), ["[2, 5, 64]", "[2, 6, A]"]),
        (dataclasses.replace(OWN, decode=Decode(lambda x: x * 4)), ["class scores", "sigmoid"]),
        (dataclasses.replace(OWN, decode=Decode(lambda x: x / 0)), ["not finite"]),
        (dataclasses.replace(OWN, decode=Decode(lambda x: x.nowhere)), ["decode failed at", "nowhere"]),
        (dataclasses.replace(OWN, loss=lambda m, t, s: m[0][0].mean()), ["loss returned", "dictionary"]),
        (dataclasses.replace(OWN, loss=lambda m, t, s: {"a": m[0][0]}), ["loss term 'a'", "scalar"]),
    ],
)
def test_each_mistake_is_named(monkeypatch: pytest.MonkeyPatch, result: Any, words: list[str]) -> None:
    model = model_of(monkeypatch, result)
    with pytest.raises(ConfigError) as caught:
        model.initial(None)
    for word in ("model.factory=", *words):
        assert word in str(caught.value)


def test_kept_weights_come_back_and_are_folded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = model_of(monkeypatch, lambda names: CustomDetector(Network(), strides=(8,)))
    detector = model.initial(None)
    norm = detector.network.stem[1]
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    model.keep(detector, tmp_path / "float.safetensors")
    restored = model.restore(tmp_path / "float.safetensors")
    assert not [module for module in restored.network.modules() if isinstance(module, nn.BatchNorm2d)]
    images = torch.rand(1, 3, 64, 64)
    assert torch.allclose(detector.eval()(images), restored(images), atol=1e-4)


def test_weights_fit_exactly_or_not_at_all(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in Network().state_dict().items()}
    torch.save(state, tmp_path / "good.pt")
    network = Network()
    load_state(network, tmp_path / "good.pt")
    assert all(value.equal(state[key]) for key, value in network.state_dict().items())
    wrong = {key: value for key, value in state.items() if key != "box.bias"}
    wrong |= {"more": torch.zeros(1), "cls.bias": torch.zeros(5)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_state(network, tmp_path / "wrong.safetensors")
    for word in ("lacks box.bias", "besides more", "cls.bias [5] instead of [2]"):
        assert word in str(caught.value)


def test_the_working_directory_is_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "octet_own_module.py").write_text("def build(names):\n    return names\n")
    (tmp_path / "json.py").write_text("def build(names):\n    return names\n")
    assert load_factory("model.factory", "octet_own_module:build")("x") == "x"
    with pytest.raises(ConfigError, match=r"is not below the working directory.*write json\.py:build"):
        load_factory("model.factory", "json:build")
    with pytest.raises(ConfigError, match="closest: build"):
        load_factory("model.factory", "octet_own_module:biuld")
    (tmp_path / "octet_broken_module.py").write_text("import json\n\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"octet_broken_module\.py:3: ZeroDivisionError"):
        load_factory("model.factory", "octet_broken_module:build")


OWN_FILE = """
import helper


class Split(list):
    names, ids = ("a",), (1, 2, 3)


def build(names):
    return helper.VALUE, names


def images(split):
    return Split(range(3))


def fails(names):
    return 1 / 0
"""


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file models/mynet.py, below the working directory, hidden by our package `models`; beside it a helper."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "helper.py").write_text("VALUE = 7\n")
    path = tmp_path / "models" / "mynet.py"
    path.write_text(OWN_FILE)
    return path


@pytest.mark.parametrize("setting", ["model.factory", "data.factory", "metric.factory"])
def test_a_factory_may_be_a_file(own_file: Path, setting: str) -> None:
    assert load_factory(setting, "models/mynet.py:build")("x") == (7, "x")
    assert load_factory(setting, f"{own_file}:build") is load_factory(setting, "models/mynet.py:build")
    assert own_file.parent.joinpath("mynet.py").samefile(
        sys.modules[load_factory(setting, "models/mynet.py:build").__module__].__file__ or ""
    )


def test_a_module_hidden_by_ours_is_told_to_name_the_file(own_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"write models/mynet\.py:build"):
        load_factory("model.factory", "models.mynet:build")
    (own_file.parent / "boxes.py").write_text("def build(names): ...\n")  # ours has a module models.boxes
    with pytest.raises(ConfigError, match=r"write models/boxes\.py:build"):
        load_factory("model.factory", "models.boxes:build")


def test_mistakes_in_a_file_name_its_line(own_file: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no file models/other.py in {own_file.parent.parent}"):
        load_factory("model.factory", "models/other.py:build")
    with pytest.raises(ConfigError, match=r"mynet\.py has no 'biuld'; closest: build"):
        load_factory("model.factory", "models/mynet.py:biuld")
    with pytest.raises(ConfigError, match=r"models/mynet\.py:18: ZeroDivisionError"):
        CustomModel("models/mynet.py:fails", NAMES, 64).build()
    (own_file.parent / "broken.py").write_text("import json\n\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"models/broken\.py:3: ZeroDivisionError"):
        load_factory("model.factory", "models/broken.py:build")
    (own_file.parent / "syntax.py").write_text("import json\n\ndef\n")
    with pytest.raises(ConfigError, match=r"models/syntax\.py:3: SyntaxError"):
        load_factory("model.factory", "models/syntax.py:build")


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_find_a_file(own_file: Path, start: str) -> None:
    split = load_factory("data.factory", "models/mynet.py:images")("val")
    loader = torch.utils.data.DataLoader(split, num_workers=1, multiprocessing_context=start)
    assert [int(item) for item in loader] == [0, 1, 2]


# -- data


class Images:
    """Four images with one box each; `changes` go into every sample."""

    names = NAMES
    ids = (3, 5, 7, 9)

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        good = Sample(
            image=np.zeros((32, 48, 3), np.uint8),
            boxes=np.array([[1, 2, 20, 30]], np.float32),
            labels=np.array([1], np.int64),
            image_id=self.ids[index],
            size=(32, 48),
        )
        return dataclasses.replace(good, **self.changes)


def with_ids(*ids: Any) -> Images:
    images = Images()
    images.ids = ids
    return images


def open_images(monkeypatch: pytest.MonkeyPatch, result: Any) -> Any:
    monkeypatch.setattr(sys.modules[__name__], "factory", lambda split: result, raising=False)
    return open_own(f"{HERE}factory", "val")


def test_a_dataset_needs_no_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_images(monkeypatch, Images())[0].image_id == 3


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1, 2], ["a list without names, ids"]),
        (Images(size=(48, 32)), ["size (48, 32)", "(32, 48)"]),
        (Images(labels=np.array([2], np.int64)), ["labels from 2 to 2", "0 to 1"]),
        (Images(boxes=np.array([[5, 2, 1, 30]], np.float32)), ["without area"]),
        (Images(image=np.zeros((3, 32, 48), np.float32)), ["float32 [3, 32, 48]", "uint8 [H, W, 3]"]),
        (Images(image_id=1), ["image_id 1", "3"]),
        (with_ids("a", "b", "c", "d"), ["ids are 'a', 'b', 'c', and 1 more", "0 to 2^63 - 1"]),
        (with_ids(1, 2, 3, 4.0), ["ids are 4.0;"]),
        (with_ids(1, 2, 3, 2**63), ["ids are 9223372036854775808;"]),
        (with_ids(-1, 2, 3, 4), ["ids are -1;"]),
    ],
)
def test_a_wrong_dataset_is_refused(monkeypatch: pytest.MonkeyPatch, result: Any, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        open_images(monkeypatch, result)
    for word in ("data.factory=", "'val'", *words):
        assert word in str(caught.value)


# -- metric


def run_metric(monkeypatch: pytest.MonkeyPatch, metric: Callable[..., Any]) -> CustomMetrics:
    monkeypatch.setattr(sys.modules[__name__], "factory", metric, raising=False)
    batches = [Batch(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(0, 6))] * 3

    def predict(images: Tensor) -> list[Tensor]:
        assert images.dtype == torch.float32
        return [image.mean() * torch.ones(1, 6) for image in images]

    return measure_custom(f"{HERE}factory", predict, batches, torch.device("cpu"))


def test_a_metric_sees_batches_and_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(predict: Any, batches: Any) -> dict[str, float]:
        found = [detections for batch in batches for detections in predict(batch.images)]
        return {"value": 0.5, "images": len(found), "precision": float(found[0][0, 0])}

    metrics = run_metric(monkeypatch, count)
    assert metrics == CustomMetrics(0.5, {"images": 6.0, "precision": 1.0})
    assert row_figures(metrics) == {"metric": 0.5, "images": 6.0, "precision": 1.0}
    assert run_metric(monkeypatch, lambda predict, batches: torch.tensor(0.25)).value == 0.25


@pytest.mark.parametrize(
    ("result", "word"),
    [({"f1": 0.5}, "'value'"), (float("nan"), "nan"), ("good", "str"), (None, "NoneType")],
)
def test_a_wrong_result_of_a_metric_is_named(monkeypatch: pytest.MonkeyPatch, result: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run_metric(monkeypatch, lambda predict, batches: result)


def test_the_value_of_a_row_is_the_metric_where_there_is_one() -> None:
    assert ResultRow.of(PTQ, {"ap": 0.5}).value == 0.5
    assert ResultRow.of(PTQ, {"metric": 0.25}).value == 0.25
    assert ResultRow.of(PTQ, {"ap": 0.5, "ap_mask": 0.125}).value == 0.125
    assert ResultRow.of(PTQ, {}).value is None
