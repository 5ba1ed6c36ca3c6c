"""Convergence of calibration, and calibration by several processes: checked against calibrations of fewer images."""

import pytest
import torch
from quant_networks import small_images, small_net

from quant import Mode, Share, activation_quantizers, calibrate, insert, place, set_mode
from quant.calibration.calibrate import collect_histograms
from quant.calibration.convergence import Convergence, Milestones


def images(count=8, size=4):
    return [small_images(size, seed) for seed in range(count)]


def calibrated(batches, method="percentile", **options):
    network = small_net()
    model = insert(network, place(network))
    return model, calibrate(model, batches, method, **options)


def scales_of(result):
    return {group.name: group.scale for group in result.groups}


def test_scales_at_each_count_are_those_of_a_calibration_that_ends_there():
    _, result = calibrated(images())
    found = result.convergence
    assert found.counts == (8, 16, 32)
    for index, num_batches in enumerate((2, 4, 8)):
        _, shorter = calibrated(images(num_batches))
        assert {name: scales[index] for name, scales in found.scales.items()} == scales_of(shorter)


@pytest.mark.parametrize(
    ("sizes", "counts"), [([3] * 12, [9, 18, 33]), ([100], [100]), ([5], []), ([8, 8, 100, 1], [8, 16, 116])]
)
def test_milestones_are_doublings(sizes, counts):
    milestones, seen = Milestones(), 0
    for size in sizes:
        seen += size
        milestones.see({}, seen)
    assert milestones.counts == counts


def test_enough_is_the_first_count_that_stays_close():
    errors = {"a": (4.0, 2.08, 2.06, 2.0), "b": (0.9, 0.9, 0.9, 1.0)}  # fewer images may do better by luck
    found = Convergence((8, 16, 32, 64), {}, errors)
    assert found.enough == 16
    assert (
        "scales from 32 instead of 64 images increase the squared error of a tensor by at most 3.0% (median 1.5%)"
        in found.sentence()
    )
    assert "16 images are enough to stay within 5%" in found.sentence()
    late = Convergence((8, 16, 32), {}, {"a": (1.0, 2.0, 1.0)})  # close by chance, then far again
    assert late.enough == 32
    assert "raise quant.calibration_images" in late.sentence()
    assert "too few" in Convergence((4,), {}, {"a": (1.0,)}).sentence()
    assert Convergence((8, 16), {}, {"zeros": (0.0, 0.0)}).enough == 8


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_errors_are_those_of_all_values(method):
    model, result = calibrated(images(), method)
    found = result.convergence
    values = {name: [] for name in found.scales}
    hooks = [
        quantizer.register_forward_hook(
            lambda _m, _i, out, name=name: values[name].append(out.double().flatten())
        )
        for name, quantizer in activation_quantizers(model).items()
        if name in values
    ]
    set_mode(model, Mode.OFF)
    with torch.no_grad():
        for batch in images():
            model(batch)
    for hook in hooks:
        hook.remove()
    for name, scales in found.scales.items():
        x = torch.cat(values[name])
        for scale, error in zip(scales, found.errors[name], strict=True):
            rounded = (x / scale).round().clamp(-127, 127) * scale
            assert error == pytest.approx(float((rounded - x).square().sum()), rel=0.02)


def test_fixed_scales_do_not_count():
    _, result = calibrated(images())
    assert set(result.convergence.scales) == set(scales_of(result))
    content = result.as_dict()["convergence"]
    assert content["images"] == [8, 16, 32]
    assert content["largest"][-1] == content["median"][-1] == 0
    assert content["largest"][0] >= content["median"][0] > 0


@pytest.mark.parametrize("size", [2, 3, 5, 11])  # eight batches: in the last case three processes get none
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
def test_processes_find_the_scales_of_one(method, size):
    """They take the batches in turn; the others' shares reach the first through `gather`."""
    alone, expected = calibrated(images(), method)
    network, others = small_net(), []
    for rank in range(1, size):
        other, milestones = insert(network, place(network)), Milestones(4, rank, size)
        others.append(
            (*collect_histograms(other, images()[rank::size], milestones.see, may_be_empty=True), milestones)
        )

    def gather(mine):
        return [mine, *others]

    shared, found = calibrated(images()[::size], method, share=Share(gather, 0, size, 4))
    assert scales_of(found) == scales_of(expected)
    assert found.num_images == 32
    assert found.convergence == expected.convergence
    for name, quantizer in activation_quantizers(shared).items():
        assert float(quantizer.scale) == float(activation_quantizers(alone)[name].scale)
