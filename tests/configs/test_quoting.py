"""Values that Hydra's grammar does not take as they are: the message has the very text to type, and it works."""

import shlex

import pytest

from configs import compose
from configs.overrides import check_overrides
from configs.schema import Config
from core.errors import ConfigError

BASE = ("+experiment=bccd", "data.root=data", "weights=w.pt")
ODD = [
    "a=b.pt", "run(1).pt", "größe.pt", "模型.pt", "a'b.pt", 'a"b.pt', "a&b.pt", "~/x.pt", "a[0].pt", "{a}", "a#b.pt",
    "a;b.pt", "a!b.pt", "a,b.pt", "1e3", "0x10=", "a\\(b).pt",
]  # fmt: skip


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["weights", "data.root"])
def test_the_remedy_is_what_has_to_be_typed(key, value):
    with pytest.raises(ConfigError) as caught:
        compose([*BASE, f"{key}={value}"])
    message = str(caught.value)
    assert message.startswith(f"'{key}={value}'")
    _, _, remedy = message.partition("quote it: ")
    typed = shlex.split(remedy.removesuffix("; for a sweep over them add -m"))  # as a shell reads it
    config = compose([*BASE, *typed])
    found = config.weights if key == "weights" else config.data.root
    assert found == value.strip("'\"") if value[0] not in "'\"" else value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages=float,calibrate", "'stages=[float,calibrate]'"),
        ("deploy.runtimes=openvino,onnxruntime", "'deploy.runtimes=[openvino,onnxruntime]'"),
        ("data.image_size=320,640", "'data.image_size=[320,640]'"),
        ("stages=[float", "every bracket closed"),
        ("+data.merge_classes={a", "expected '+data.merge_classes={A: B}'"),
        ("seed=1,2", "add -m"),
        ("weights", "write weights=VALUE"),
        ("seed =3", "no space before the equals sign; write seed=3"),
        ("device=mps", "Apple's GPUs are not supported.*device=auto"),
        ("device=gpu", "expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_other_slips_have_their_own_remedy(override, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[").replace("{", r"\{").replace("+", r"\+")):
        compose([*BASE, override])


def test_sweeps_take_several_values():
    for override in ("seed=1,2", "weights=a.pt,b.pt", "stages=[float],[float,calibrate]", "quant=int8,w4a8"):
        check_overrides([override], Config, [], sweeping=True)
    with pytest.raises(ConfigError, match=r"in brackets: 'stages=\[float,calibrate\]'"):
        check_overrides(["stages=float,calibrate"], Config, [], sweeping=True)


def test_plain_values_stay_as_they_are():
    for value in ("a b.pt", "a:b", "a@b.pt", "50%.pt", "007", "C:\\x\\y.pt", "-x.pt"):
        assert compose([*BASE, f"weights={value}"]).weights == value
    assert compose([*BASE, "run_dir=null"]).run_dir is None
    assert compose([*BASE, "stages=[float,calibrate]"]).stages == ["float", "calibrate"]
