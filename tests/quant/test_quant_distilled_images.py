"""Distillation of some of a batch's images: which ones, the terms by hand, and what the teacher computes."""

import math
from fractions import Fraction

import pytest
import torch
from fine_tuning import STEPS, fine_tune
from quant_networks import small_images, small_net, small_quantized
from torch import nn

from core.processes import BatchPart, summing
from quant import FineTuningOptions, QuantizationAware, Rule, feature_nodes
from quant.finetuning.distillation import flatten_maps, images_compared, with_features


def part_of(step, size, num_parts=1, number=0):
    """A part of a batch that is divided in turn, as among processes."""
    return BatchPart(step, range(number, size, num_parts), size)


def compared(share, part):
    return list(part.places)[images_compared(share, part)]


class Counted(nn.Module):
    """A teacher that notes how many images it sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, images):
        self.seen.append(len(images))
        return self.network(images)


# -- which images


def test_the_places_move_on_from_step_to_step():
    quarter = [compared(0.25, part_of(step, 8)) for step in range(5)]
    assert quarter == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]
    third = [compared(1 / 3, part_of(step, 8)) for step in range(4)]
    assert third == [[0, 1, 2], [2, 3, 4], [5, 6, 7], [0, 1, 2]]
    assert compared(1.0, part_of(3, 8)) == list(range(8))
    assert [compared(0.1, part_of(step, 3)) for step in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_each_step_takes_the_share_and_all_images_have_their_turn(size, share):
    wanted = max(1, round(Fraction(share).limit_denominator(100) * size))
    steps = [compared(share, part_of(step, size)) for step in range(math.ceil(size / wanted))]
    assert {len(places) for places in steps} == {wanted}
    assert {place for places in steps for place in places} == set(range(size))


@pytest.mark.parametrize("num_parts", [2, 3, 4])
def test_processes_together_compare_what_one_does_and_each_its_fair_share(num_parts):
    for step in range(6):
        places = [compared(0.25, part_of(step, 16, num_parts, number)) for number in range(num_parts)]
        assert sorted(place for mine in places for place in mine) == compared(0.25, part_of(step, 16))
        assert max(map(len, places)) - min(map(len, places)) <= 1


# -- the terms


def by_hand(students, teachers, seen=None):
    """Mean over maps of the mean squared error over the teacher's variance, value by value; the variance is of all
    images seen so far, by default of those compared."""
    terms = []
    for student, teacher, all_seen in zip(students, teachers, seen or teachers, strict=True):
        own, wanted, values = (maps.flatten().tolist() for maps in (student, teacher, all_seen))
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        error = math.fsum((s - t) ** 2 for s, t in zip(own, wanted, strict=True)) / len(own)
        terms.append(error / variance)
    return sum(terms) / len(terms)


def test_output_and_features_of_the_compared_images_by_hand():
    """The student's pass is over the whole batch, the teacher's over two of its eight images."""
    model, teacher = small_quantized().train(), small_net()
    names = feature_nodes(teacher)
    network, reference = with_features(model, names), with_features(teacher, names)
    options = FineTuningOptions(distill_weight=2.0, feature_weight=0.5, distill_images=0.25)
    extension = QuantizationAware(model, options, small_net())
    extension.teacher = counted = Counted(extension.teacher)
    images = small_images(8)
    for step, window in enumerate(([0, 1], [2, 3], [4, 5], [6, 7])):
        raw, terms = extension.losses(network(images), images, 0.0, part_of(step, 8))
        assert torch.equal(raw, network(images)[0])
        with torch.no_grad():
            ours, theirs = network(images), reference(images)
        for name, weight, maps in (
            ("distillation", 2.0, (ours[0], theirs[0])),
            ("features", 0.5, (ours[1][0], theirs[1][0])),
        ):
            seen = [maps[1][: window[-1] + 1]]
            expected = weight * by_hand(*([values[window]] for values in maps), seen)
            assert float(terms[name].detach()) == pytest.approx(expected, rel=1e-4)
        extension.after_step(0.0)
    assert counted.seen == [2] * 4


def test_errors_and_gradients_of_all_turns_average_to_those_of_the_whole_batch():
    """In units of the variance of what has been seen: the whole batch, and a window again."""
    teacher = nn.Identity()
    images = small_images(8)
    student = (images + 0.1 * small_images(8, seed=5)).requires_grad_()
    extension = QuantizationAware(small_quantized(), FineTuningOptions(distill_images=0.25), teacher)
    for step in range(4):
        extension.losses(student, images, 0.0, part_of(step, 8))
        extension.after_step(0.0)
    mean = torch.zeros(())
    for step in range(4):
        variance = torch.cat([images, images[2 * step : 2 * step + 2]]).var()
        term = extension.losses(student, images, 0.0, part_of(step, 8))[1]["distillation"]
        mean = mean + term * variance / 4
    (gradient,) = torch.autograd.grad(mean, student)
    error = (student - images).detach()
    assert float(mean.detach()) == pytest.approx(float(error.square().mean()), rel=1e-5)
    torch.testing.assert_close(gradient, 2 * error / error.numel(), rtol=1e-4, atol=1e-9)


def test_a_step_that_is_taken_again_counts_once():
    """Without memory a step is repeated: only what `after_step` confirms stays."""
    images = small_images(8)
    extension = QuantizationAware(small_quantized(), FineTuningOptions(distill_images=0.25), nn.Identity())
    for _ in range(3):
        extension.losses(images, images, 0.0, part_of(0, 8))
    extension.after_step(0.0)
    extension.losses(images, images, 0.0, part_of(1, 8))
    (sums,) = extension.state_dict()["seen_distillation"].tolist()
    values = images[:2].double()
    assert sums == pytest.approx([values.numel(), float(values.sum()), float(values.square().sum())])


def test_all_images_need_no_memory_of_earlier_ones():
    extension = QuantizationAware(small_quantized(), FineTuningOptions(), nn.Identity())
    images = small_images(8)
    extension.losses(images, images, 0.0, part_of(0, 8))
    extension.after_step(0.0)
    assert not any(name.startswith("seen") for name in extension.state_dict())


def test_parts_without_compared_images_ask_no_teacher_and_add_nothing():
    """Four processes, one image of four compared: their terms add up to that image's."""
    counted = Counted(nn.Identity())
    extension = QuantizationAware(small_quantized(), FineTuningOptions(distill_images=0.25), counted)
    images, student = small_images(4), small_images(4, seed=3).requires_grad_()
    moments = torch.tensor(
        [[images[2].numel(), images[2].double().sum(), images[2].double().square().sum()]],
        dtype=torch.float64,
    )
    found = []
    with summing(lambda value: moments, 4):
        for place in range(4):
            part = BatchPart(2, range(place, place + 1), 4)
            own = slice(place, place + 1)
            found.append(extension.losses(student[own], images[own], 0.0, part)[1]["distillation"])
    sum(found).backward()
    assert counted.seen == [1]
    assert [float(term.detach()) for term in found[:2] + found[3:]] == [0.0] * 3
    assert float(found[2].detach()) == pytest.approx(by_hand([student[2]], [images[2]]), rel=1e-4)
    assert [bool(gradient.any()) for gradient in student.grad] == [False, False, True, False]


def test_a_process_alone_without_compared_images_has_a_term_of_0():
    extension = QuantizationAware(small_quantized(), FineTuningOptions(distill_images=0.25), nn.Identity())
    images = small_images(1)
    term = extension.losses(images + 1, images, 0.0, BatchPart(0, range(3, 4), 4))[1]["distillation"]
    assert float(term) == 0.0


def test_all_images_are_compared_where_an_output_has_no_axis_of_images(caplog):
    class Flat(nn.Module):
        def forward(self, images):
            return images, images.mean(1).flatten()  # the second: a value per pixel of all images

    extension = QuantizationAware(small_quantized(), FineTuningOptions(distill_images=0.25), Flat())
    images = small_images(4)
    student = flatten_maps(Flat()(images + 0.1 * small_images(4, seed=3)))
    for step in range(2):
        terms = extension.losses(student, images, 0.0, part_of(step, 4))[1]
        assert float(terms["distillation"]) == pytest.approx(by_hand(student, Flat()(images)), rel=1e-4)
    assert [record.getMessage()[:44] for record in caplog.records] == [
        "distillation compares all images of each bat"
    ]


# -- training


def test_a_quarter_of_the_images_brings_the_student_closer():
    """The teacher's answers at 3 bits, distillation alone: on images that training has not seen."""
    teacher, counted, images = small_net(), Counted(small_net()), small_images(8, seed=999)
    model = small_quantized(rules=(Rule("*", bits=3),))

    def distance():
        with torch.no_grad():
            return by_hand([model.eval()(images)], [teacher(images)])

    before = distance()
    rates = {"learning_rate": 3e-3, "scale_learning_rate": 1e-2}
    fine_tune(model, counted, epochs=20, task_weight=0.0, distill_images=0.25, **rates)
    assert distance() < 0.6 * before
    assert counted.seen == [1] * 20 * STEPS
