"""Class names of weights, engines and splits: one order by name, or no figure.

The oracle: a figure does not depend on the order in which a dataset lists its classes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_splits import write_yolo

from configs import compose
from configs.data_schema import DataConfig
from core.errors import DataError, OctetError
from data import Sample, class_positions, open_dataset, reorder_classes
from models import build_detector, fold_detector, save_detector
from pipeline import evaluate
from pipeline.class_names import ClassNames, is_unnamed
from pipeline.input_check import check_input
from pipeline.job import Job
from pipeline.prediction.predictors import Predictor, partner_classes
from pipeline.run.directory import Run
from pipeline.splits import Splits
from pipeline.stages.load import load_stage
from pipeline.stages.report import _notes
from pipeline.stages.training import train_stage

NAMES = ("cat", "dog", "emu")


def job_for(folder: Path, data: Path, weights: Path, *more: str) -> Job:
    config = compose(
        ["+experiment=detector", f"data.root={data}", "data.image_size=64", f"weights={weights}", "data.workers=0",
         "data.cache_dir=null", "stages=[float,calibrate,report]", *more]
    )  # fmt: skip
    return Job(config, Run.create(folder / "run", "detector"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that names its classes."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_detector(fold_detector(build_detector("yolov9t", len(NAMES), names=NAMES).eval()), path)
    return path


def test_placeholder_names_give_way_to_the_datas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector = fold_detector(build_detector("yolov9t", 4).eval())
    weights = tmp_path / "nameless.npz"
    np.savez(
        weights, **{f"network.{key}": value.numpy() for key, value in detector.network.state_dict().items()}
    )
    config = compose(
        [
            "+experiment=demo", "data.synthetic.train=2", "data.synthetic.val=2", "data.synthetic.size=64",
            f"data.root={tmp_path / 'set'}", "data.image_size=64", f"weights={weights}",
        ]
    )  # fmt: skip
    job = Job(config, Run.create(tmp_path / "run", "demo"))
    load_stage(job)
    assert job.networks.detector.names == tuple(job.splits.val.names)
    assert len(set(job.networks.detector.names)) == 4
    assert capsys.readouterr().err.count("has no class names") == 1


# ---------------------------------------------------------------------------------------------------- names to order
@pytest.mark.parametrize(
    ("given", "wanted", "positions"),
    [
        (("dog", "cat"), ("cat", "dog"), [1, 0]),
        (("c", "a", "b"), ("a", "b", "c"), [2, 0, 1]),
        (("Cat", " dog"), ("dog", "cat"), [1, 0]),
        (("a", "A"), ("A", "a"), [1, 0]),
        (("a", "A"), ("a", "b"), None),
        (("a", "b"), ("a", "c"), None),
        (("a", "b"), ("a",), None),
        ((), (), []),
    ],
)
def test_positions_by_name(given: tuple, wanted: tuple, positions: list[int] | None) -> None:
    assert class_positions(given, wanted) == positions


@pytest.mark.parametrize(
    ("names", "unnamed"),
    [
        (("class0", "class1"), True),
        (("0", "1"), True),
        (("0", "2"), False),
        (("class1", "class0"), False),
        (NAMES, False),
    ],
)
def test_what_counts_as_unnamed(names: tuple[str, ...], unnamed: bool) -> None:
    assert is_unnamed(names) is unnamed


# --------------------------------------------------------------------------------------------- weights against data
@pytest.mark.parametrize("order", [("dog", "emu", "cat"), ("CAT", "Emu", "dog")])
def test_data_in_another_order_is_brought_into_that_of_the_weights(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], order: tuple[str, ...]
) -> None:
    job = job_for(tmp_path, write_yolo(tmp_path / "set", order), weights)
    (tmp_path / "set/images/val/._a.jpg").write_bytes(b"hidden")
    check_input(job)
    for dataset in (job.splits.train, job.splits.val):
        assert tuple(dataset.names) == NAMES
        # write_yolo: class i of the file is 0.2 + 0.1 i of 60 pixels wide
        for record in dataset.records:
            found = {
                NAMES[label]: round(w / 60, 3) for label, w in zip(record.labels, widths(record), strict=True)
            }
            assert found == {
                name.lower(): pytest.approx(0.2 + 0.1 * index) for index, name in enumerate(order)
            }
    assert capsys.readouterr().err.count("were renumbered to the order of") == 2  # both splits, each once
    assert sum("by name" in note for note in _notes(job)) == 2
    assert any(note.startswith("Validation data: Left out 1 hidden files") for note in _notes(job))
    load_stage(job)
    again = Job(job.config, job.run)  # a resumed run: the names are those of the kept model
    assert again.splits.digest("val") == job.splits.digest("val")


def widths(record: Any) -> np.ndarray:
    return record.boxes[:, 2] - record.boxes[:, 0]


def test_the_setting_takes_classes_by_number_and_says_so(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, order in enumerate((("dog", "emu", "cat"), ("x", "y", "z"))):
        folder = tmp_path / str(number)
        job = job_for(folder, write_yolo(folder / "set", order), weights, "data.class_map=order")
        check_input(job)
        assert tuple(job.splits.val.names) == order
        assert job.splits.val.records[0].labels.tolist() == [0, 1, 2]
        assert "matched by number (data.class_map=order)" in capsys.readouterr().err
        assert any("matched by number" in note for note in _notes(job))


def test_trained_weights_have_the_names_of_their_data(tmp_path: Path, weights: Path) -> None:
    data = write_yolo(tmp_path / "set", ("x", "y", "z"))
    job = job_for(
        tmp_path, data, weights, "data.class_map=order", "train.epochs=1", "train.batch_size=2", "threads=1"
    )
    check_input(job)
    train_stage(job)
    assert job.networks.detector.names == ("x", "y", "z")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ("cat", "dog", "fox"),
            ["cat, dog, emu", "cat, dog, fox", "data.class_map=order", "data.merge_classes"],
        ),
        (("cat", "dog"), ["3 classes", "2", "data.merge_classes"]),
    ],
)
def test_other_names_end_the_run(
    tmp_path: Path, weights: Path, names: tuple[str, ...], words: list[str]
) -> None:
    job = job_for(tmp_path, write_yolo(tmp_path / "set", names), weights)
    with pytest.raises(OctetError) as caught:
        check_input(job)
    assert caught.value.exit_code == 3
    for word in words:
        assert word in str(caught.value)


def test_merged_classes_are_matched_by_their_new_names(tmp_path: Path, weights: Path) -> None:
    data = write_yolo(tmp_path / "set", ("puppy", "kitten", "emu"))
    job = job_for(tmp_path, data, weights, "+data.merge_classes={emu: [emu], dog: [puppy], cat: [kitten]}")
    check_input(job)
    assert tuple(job.splits.val.names) == NAMES
    assert sorted(job.splits.val.records[0].labels.tolist()) == [0, 1, 2]


# -------------------------------------------------------------------------------------------------- between splits
def test_splits_with_categories_in_another_order(tmp_path: Path) -> None:
    """Each COCO JSON numbers its own categories."""
    root = tmp_path / "set"
    write_yolo(root)
    (root / "data.yaml").unlink()
    for split, order in (("train", ("dog", "cat")), ("val", ("cat", "dog"))):
        (root / "annotations").mkdir(exist_ok=True)
        content = {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": order.index("dog"), "bbox": [1, 1, 9, 9]}
            ],
            "categories": [{"id": index, "name": name} for index, name in enumerate(order)],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    splits = Splits(DataConfig(root=str(root), cache_dir=None), "detect", torch.device("cpu"))
    assert splits.train.names == splits.val.names == ("cat", "dog")
    assert splits.train.records[0].labels.tolist() == splits.val.records[0].labels.tolist() == [1]
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text().replace('"cat"', '"bird"'))
    splits = Splits(DataConfig(root=str(root), cache_dir=None), "detect", torch.device("cpu"))
    with pytest.raises(DataError, match=r"split 'val' are cat, dog.*split 'train' are dog, bird"):
        splits.train  # noqa: B018


class Own:
    names, ids = ("dog", "cat"), (5,)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        boxes = np.array([[1, 1, 5, 5], [2, 2, 8, 8]], np.float32)
        return Sample(
            np.zeros((9, 9, 3), np.uint8), boxes, np.array([0, 1], np.int64), self.ids[index], (9, 9)
        )


def test_own_datasets_are_renumbered_too() -> None:
    dataset = reorder_classes(Own(), ("cat", "dog"), [1, 0])
    assert (dataset.names, list(dataset.ids), len(dataset)) == (("cat", "dog"), [5], 1)
    assert dataset[0].labels.tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------------ the commands
def predictor(label: str, *names: str) -> Predictor:
    return Predictor(label, names, (32, 32), lambda _: [])


def test_compared_models_are_matched_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    order = partner_classes(predictor("a", "cat", "dog"), predictor("b", "dog", "cat"))
    assert order is not None
    assert order.tolist() == [1, 0]
    assert "another order" in capsys.readouterr().err
    assert partner_classes(predictor("a", "cat", "dog"), predictor("b", "cat", "dog")) is None
    assert partner_classes(predictor("a", "cat", "dog"), predictor("b", "0", "1")) is None
    for names in (("cat", "fox"), ("cat",)):
        with pytest.raises(DataError, match="compare models of the same classes"):
            partner_classes(predictor("a", "cat", "dog"), predictor("b", *names))


@pytest.mark.slow
def test_a_figure_does_not_depend_on_the_order_of_the_datas_classes(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, source = shared_data / "weights/gelan-t-bccd.pt", shared_data / "data/bccd"
    figures: dict[tuple[str, str], float] = {}
    for name, order in (("same", [0, 1, 2]), ("other", [2, 0, 1])):
        root = tmp_path / name
        names = open_dataset(source, "val", verify=False).names
        for image in sorted((source / "images/val").iterdir())[:3]:
            (root / "images/val").mkdir(parents=True, exist_ok=True)
            (root / "labels/val").mkdir(parents=True, exist_ok=True)
            shutil.copy(image, root / "images/val")
            lines = (source / "labels/val" / f"{image.stem}.txt").read_text().splitlines()
            moved = [f"{order.index(int(line.split()[0]))} {line.split(maxsplit=1)[1]}" for line in lines]
            (root / "labels/val" / f"{image.stem}.txt").write_text("\n".join(moved))
        (root / "data.yaml").write_text(f"val: images/val\nnames: {[names[index] for index in order]}\n")
        for class_map in ("names", "order")[: len(figures) + 1]:
            file = tmp_path / "figures.json"
            arguments = [
                str(weights),
                "--data",
                str(root),
                "--size",
                "320",
                "--json",
                str(file),
                "--threads",
                "1",
            ]
            assert evaluate.main([*arguments, "--class-map", class_map]) == 0
            figures[name, class_map] = json.loads(file.read_text())["ap"]
    assert figures["same", "names"] > 0.4
    assert figures["other", "names"] == figures["same", "names"]
    assert figures["other", "order"] < 0.1
    assert "by name" in capsys.readouterr().err


def test_evaluate_leaves_out_dangling_links_when_told(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_yolo(tmp_path / "set", NAMES)
    (data / "images/val/gone.jpg").symlink_to("nowhere")
    arguments = [str(weights), "--data", str(data), "--size", "64", "--limit", "1"]
    assert evaluate.main(arguments) == 3
    assert "--dangling-links skip of commands" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--dangling-links", "skip"]) == 0
    assert "Left out 1 broken links" in capsys.readouterr().err


def test_evaluate_refuses_other_names(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_yolo(tmp_path / "set", ("cat", "dog", "fox"))
    assert evaluate.main([str(weights), "--data", str(data), "--size", "64"]) == 3
    assert "--class-map order" in capsys.readouterr().err
    assert evaluate.main([str(weights), "--data", str(write_yolo(tmp_path / "two")), "--size", "64"]) == 3
    assert "3 classes (cat, dog, emu)" in capsys.readouterr().err


def test_names_of_the_weights_are_found_without_building_a_network(tmp_path: Path, weights: Path) -> None:
    job = job_for(tmp_path, write_yolo(tmp_path / "set", NAMES), weights)
    assert job.splits.find_names() == ClassNames(str(weights), NAMES)
