"""Layouts: which one is chosen, what measuring leaves alone, and that a step trains in what was chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from training import TrainingOptions, TrainingState, train_epochs
from training.layout import faster_layout, faster_precision, measure_layouts


class Small(nn.Module):
    """A convolution with normalisation, and optionally a view that channels-last does not allow."""

    def __init__(self, views: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.views = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), views

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.conv(x))
        return {"maps": y.view(len(x), -1) if self.views else y}


@pytest.mark.parametrize(
    ("contiguous", "channels_last", "chosen"),
    [
        (1.0, 0.9, "channels_last"),
        (1.0, 0.99, "contiguous"),
        (1.0, 1.2, "contiguous"),
        (1.0, math.inf, "contiguous"),
    ],
)
def test_channels_last_must_gain(contiguous: float, channels_last: float, chosen: str) -> None:
    assert faster_layout({"contiguous": contiguous, "channels_last": channels_last}) == chosen


@pytest.mark.parametrize(("bfloat16", "chosen"), [(0.8, "bfloat16"), (0.95, "float32"), (3.0, "float32")])
def test_bfloat16_must_gain_more(bfloat16: float, chosen: str) -> None:
    assert faster_precision(1.0, bfloat16) == chosen


@pytest.mark.parametrize("autocast", [False, True])
def test_measuring_changes_nothing(autocast: bool) -> None:
    network = Small().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seconds = measure_layouts(network, torch.rand(2, 3, 16, 16), autocast, rounds=1)
    assert all(0 < value < math.inf for value in seconds.values())
    assert set(seconds) == {"contiguous", "channels_last"}
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())


def test_inference_is_measured_in_evaluation_mode_and_without_gradients() -> None:
    network = Small().train()
    seen: set[tuple[bool, bool, bool]] = set()
    network.conv.register_forward_hook(
        lambda module, inputs, output: seen.add(
            (module.training, output.requires_grad, inputs[0].is_contiguous())
        )
    )
    seconds = measure_layouts(network, torch.rand(2, 3, 16, 16), rounds=1, backward=False)
    assert seen == {(False, False, True), (False, False, False)}
    assert all(0 < value < math.inf for value in seconds.values())
    assert network.training


def test_a_network_that_does_not_run_in_channels_last_trains_contiguous() -> None:
    seconds = measure_layouts(Small(views=True), torch.rand(2, 3, 16, 16), rounds=1)
    assert seconds["channels_last"] == math.inf
    assert faster_layout(seconds) == "contiguous"


def test_a_fault_of_the_network_itself_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        measure_layouts(Small(), torch.rand(2, 4, 16, 16), rounds=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_runs_in_the_layout_and_type_of_the_options(channels_last: bool, autocast: bool) -> None:
    network = Small()
    seen: list[tuple[bool, torch.dtype]] = []
    network.conv.register_forward_hook(
        lambda _, inputs, output: seen.append(
            (inputs[0].is_contiguous(memory_format=torch.channels_last), output.dtype)
        )
    )
    options = TrainingOptions(1, autocast=autocast, channels_last=channels_last)
    state = TrainingState(network, options)

    def loss(raw: dict[str, Tensor], targets: object, size: tuple[int, int]) -> dict[str, Tensor]:
        return {"maps": raw["maps"].float().square().mean()}

    images = torch.rand(2, 3, 16, 16)
    for _ in train_epochs(state, lambda epoch, done: [(images, None)], 1, loss):
        pass
    assert seen == [(channels_last, torch.bfloat16 if autocast else torch.float32)]
