"""Feature distillation: which tensors are found, that both networks give the same ones, and what the loss does."""

import pytest
import torch
from fine_tuning import fine_tune
from quant_networks import NeckNet, folded, small_images, small_net
from torch import nn

from core.errors import DistillationError
from models import build_detector, fold_detector
from quant import (
    Mode,
    Rule,
    calibrate,
    feature_nodes,
    insert,
    place,
    set_mode,
    trace,
)
from quant.finetuning.distillation import distillation_loss, with_features


def test_a_nearly_constant_map_counts_in_units_of_its_kind():
    """Variances 4 and 0.0004 on maps of two channels, 0.0004 on one of three: only the second is lifted, to 0.2."""
    loud, quiet = torch.tensor([[[-2.0, 2.0]] * 2]), torch.tensor([[[-0.02, 0.02]] * 2])
    alone = torch.tensor([[[-0.02, 0.02]] * 3])
    teacher = [loud, quiet, alone]
    expected = []
    for index, target in enumerate(teacher):
        student = [t + 0.1 if i == index else t for i, t in enumerate(teacher)]
        kind = [t.var(correction=1) for t in teacher if t.shape == target.shape]
        variance = max(float(target.var()), 0.1 * float(torch.stack(kind).mean()))
        expected.append(0.01 / variance / 3)
        assert float(distillation_loss(student, teacher, floor=0.1)) == pytest.approx(expected[-1], rel=1e-4)
        plain = 0.01 / float(target.var()) / 3
        assert float(distillation_loss(student, teacher, floor=0.0)) == pytest.approx(plain, rel=1e-4)
    assert expected[1] < 0.01 * expected[2]


@pytest.mark.parametrize("architecture", ["yolov9t", "yolov9e"])
def test_what_enters_the_head_is_found_without_naming_a_model(architecture):
    """The oracle is the network itself: the features its neck hands to its head."""
    network = fold_detector(build_detector(architecture, 3)).network.eval()
    handed_over = []
    hook = network.head.register_forward_pre_hook(lambda module, args: handed_over.extend(args[0]))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        network(images)
        hook.remove()
        _, features = with_features(trace(network), feature_nodes(network))(images)
    assert [feature.shape[-1] for feature in features] == [8, 4, 2]
    assert len(features) == len(handed_over)
    assert all(torch.equal(a, b) for a, b in zip(features, handed_over, strict=True))


def test_a_network_with_one_output_is_compared_before_its_last_layer():
    assert feature_nodes(small_net()) == ["last_act"]


def test_a_network_of_one_layer_has_nothing_inside():
    with pytest.raises(DistillationError, match="between input and output"):
        feature_nodes(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_patterns_name_tensors():
    assert feature_nodes(small_net(), ["stem.act", "side.*"]) == ["stem_act", "side_conv", "side_act"]


def test_a_pattern_without_a_match_names_the_closest():
    with pytest.raises(DistillationError, match=r"'side\.akt' matches no tensor.*closest: 'side\.act'"):
        feature_nodes(small_net(), ["side.akt"])


def test_the_student_has_the_tensors_of_its_teacher_by_name():
    """With its quantizers off the student computes what the teacher does, so the features are equal bit for bit."""
    network = folded(NeckNet())
    student = insert(network, place(network)).eval()
    images = torch.rand(1, 3, 64, 64)
    names = feature_nodes(network)
    assert len(names) == 3
    with torch.no_grad():
        ours, theirs = with_features(student, names)(images), with_features(network, names)(images)
    assert float(distillation_loss(ours, theirs)) == 0.0


def test_a_student_of_another_network_is_told():
    with pytest.raises(DistillationError, match="no node 'nonsense'"):
        with_features(small_net(), ["nonsense"])


def test_parameters_are_shared_with_the_network():
    network = small_net()
    twin = with_features(network, feature_nodes(network))
    assert {id(p) for p in twin.parameters()} == {id(p) for p in network.parameters()}


def batches(epoch, samples=0):
    for step in range(4):
        yield small_images(4, seed=10 * epoch + step), torch.zeros(1)


def train(student, teacher, **changes):
    """Without a task loss: distillation alone."""
    options = {
        "epochs": 12,
        "learning_rate": 3e-3,
        "scale_learning_rate": 1e-2,
        "task_weight": 0.0,
        **changes,
    }
    return fine_tune(student, teacher, batches, **options)


def distances(student, teacher):
    """Unexplained variance of the student's and the teacher's features on images that training has not seen."""
    names, images = feature_nodes(teacher), small_images(8, seed=999)
    with torch.no_grad():
        return float(
            distillation_loss(
                with_features(student, names)(images)[1], with_features(teacher, names)(images)[1]
            )
        )


def test_features_alone_bring_the_student_closer():
    teacher = small_net()
    student = insert(teacher, place(teacher, rules=(Rule("*", bits=3),))).eval()
    calibrate(student, [small_images()])
    before = distances(student, teacher)
    output = student.get_submodule("output").weight.clone()
    state = train(student, teacher, feature_weight=1.0, distill_weight=0.0)
    assert all(set(record.losses) == {"features", "total"} for record in state.records)
    assert distances(student, teacher) < 0.6 * before
    assert not any(isinstance(key, str) and "WithFeatures" in key for key in student.state_dict())
    assert output.norm() > 0.99 * student.get_submodule("output").weight.norm()  # it is behind the features


def test_weight_and_record_of_the_feature_term():
    teacher = small_net()
    student = insert(teacher, place(teacher)).eval()
    calibrate(student, [small_images()])
    set_mode(student, Mode.QUANTIZE)
    names = feature_nodes(teacher)
    images, _ = next(batches(0))
    student.train()
    ours, theirs = with_features(student, names)(images)[1][0], with_features(teacher, names)(images)[1][0]
    expected = 0.25 * float(((ours - theirs).square().mean() / theirs.var()).detach())
    choices = {"feature_weight": 0.25, "learning_rate": 0.0, "scale_learning_rate": 0.0}
    state = train(student, teacher, epochs=1, **choices)
    assert state.records[0].losses["features"] == pytest.approx(expected, rel=1e-5)
    assert state.records[0].losses["distillation"] > 0


def test_without_weight_no_second_graph_is_made(monkeypatch):
    def refuse(*args):
        raise AssertionError("features were asked for")

    monkeypatch.setattr("quant.finetuning.quantization_aware.with_features", refuse)
    monkeypatch.setattr("quant.finetuning.quantization_aware.feature_nodes", refuse)
    teacher = small_net()
    student = insert(teacher, place(teacher)).eval()
    calibrate(student, [small_images()])
    train(student, teacher, epochs=1)
