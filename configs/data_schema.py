"""Settings of the data section: where images come from and how they are fed; a part of `configs.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.setting import MAX_SEED, setting
from core.choices import CLASS_MAPS, DANGLING_LINKS
from core.image_size import ImageSize


@dataclass
class SyntheticConfig:
    """The built-in detection set, drawn rather than downloaded."""

    train: int = setting(256, "Training images to draw", unit="images", minimum=1, maximum=1_000_000)
    val: int = setting(64, "Validation images to draw", unit="images", minimum=1, maximum=1_000_000)
    size: int = setting(192, "Side of the square images", unit="pixels", minimum=32, maximum=8192)
    seed: int = setting(
        0, "Seed of the drawing; the same seed gives the same files", minimum=0, maximum=MAX_SEED
    )


@dataclass
class DataConfig:
    """Where the images come from and how they are fed."""

    kind: str = setting(
        "folder", "folder reads data.root; synthetic generates images", choices=("folder", "synthetic")
    )
    root: str | None = setting(
        None, "Folder of the dataset: a YOLO data.yaml tree or COCO JSON; for synthetic, a cache"
    )
    format: str = setting("auto", "Layout of the folder; auto detects it", choices=("auto", "yolo", "coco"))
    factory: str | None = setting(
        None,
        "path/to/file.py:function or package.module:function, from a split's name to its dataset, instead of a folder; "
        "see docs/custom.md",
    )
    cache_dir: str | None = setting(
        "runs/cache", "Folder that records which images were verified; none verifies them in every run"
    )
    image_size: Any = setting(
        640,
        "Network input after letterboxing: one number for a square, or a list of height and width",
        unit="pixels",
        minimum=32,
        maximum=8192,
        multiple=32,
        is_size=True,
    )
    workers: int = setting(
        2, "Loader processes; 0 loads in the main process", unit="processes", minimum=0, maximum=256
    )
    train_split: str = setting("train", "Split used for training and calibration")
    val_split: str = setting("val", "Split used for every reported figure")
    merge_classes: dict[str, list[Any]] = setting(
        {}, "New class -> old class names or indices; others are dropped. Empty keeps the classes as they are"
    )
    class_map: str = setting(
        "names",
        "How classes of weights and data are matched: by name, which renumbers labels in another order and refuses "
        "other names, or by number, which ignores names",
        choices=CLASS_MAPS,
    )
    dangling_links: str = setting(
        "error",
        "Broken links in the dataset: refused, or left out and counted",
        choices=DANGLING_LINKS,
    )
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    limit_train: int | None = setting(
        None,
        "Use at most N training images, spread evenly over the split; calibration, too",
        unit="images",
        minimum=1,
    )
    limit_val: int | None = setting(
        None, "Use only N validation images, spread evenly over the split", unit="images", minimum=1
    )

    @property
    def input_size(self) -> ImageSize:
        """Height and width of the network's input."""
        return ImageSize.of(self.image_size)
