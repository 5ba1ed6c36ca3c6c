"""Weights that name no classes get the names of the data they are measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from configs import compose
from models import build_detector, fold_detector
from pipeline.job import Job
from pipeline.run.directory import Run
from pipeline.stages.load import load_stage


def test_placeholder_names_give_way_to_the_datas(tmp_path: Path) -> None:
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
