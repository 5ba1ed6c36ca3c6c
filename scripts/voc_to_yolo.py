"""Converts a Pascal VOC dataset to a YOLO tree, which `data.root` accepts.

    python scripts/voc_to_yolo.py VOC OUT --classes RBC,WBC,Platelets

VOC is a folder with `Annotations/NAME.xml`, `JPEGImages/NAME.jpg` and `ImageSets/Main/{train,val,test}.txt`. OUT gets
`images/SPLIT`, `labels/SPLIT` and `data.yaml`. Boxes are clipped to the image. Boxes without area are left out and
counted. The corners are used as they are: x1 = xmin, without the half pixel of 1-based coordinates.
Exit code 3 if the dataset cannot be converted; OUT is written only if all of it can.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

SPLITS = ("train", "val", "test")
MAX_BYTES = 1 << 20  # of an annotation


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("voc", type=Path, help="folder with Annotations, JPEGImages and ImageSets/Main")
    parser.add_argument("out", type=Path, help="folder to write; it must not contain images or labels yet")
    parser.add_argument("--classes", required=True, help="class names in the order of their numbers: A,B,C")
    options = parser.parse_args(arguments)
    try:
        convert(options.voc, options.out, options.classes.split(","))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


def convert(voc: Path, out: Path, names: Sequence[str]) -> None:
    """Convert all splits that have a list, and print their numbers of images and objects.

    Raises:
        ValueError: no list, an unknown class, an annotation that cannot be read, or OUT is in use.
        FileNotFoundError: an image or annotation is missing.
    """
    lists = {split: voc / "ImageSets/Main" / f"{split}.txt" for split in SPLITS}
    splits = {
        split: path.read_text(encoding="utf-8").split() for split, path in lists.items() if path.is_file()
    }
    if not splits:
        raise ValueError(
            f"{voc / 'ImageSets/Main'} has none of train.txt, val.txt and test.txt: not a VOC dataset."
        )
    used = [folder for folder in (out / "images", out / "labels") if folder.exists()]
    if used:
        raise ValueError(f"{used[0]} exists: remove it, or choose another folder.")
    labels: dict[str, dict[str, list[str]]] = {}
    for split, images in splits.items():
        labels[split] = {}
        num_dropped = 0
        for image in images:
            labels[split][image], dropped = read_annotation(voc / "Annotations" / f"{image}.xml", names)
            num_dropped += dropped
            if not picture(voc, image).is_file():
                raise FileNotFoundError(f"{picture(voc, image)} is missing: {lists[split]} lists {image}.")
        num_objects = sum(map(len, labels[split].values()))
        print(f"{split}: {len(images)} images, {num_objects} objects, {num_dropped} without area left out")
    for split, found in labels.items():
        for kind in ("images", "labels"):
            (out / kind / split).mkdir(parents=True)
        for image, lines in found.items():
            shutil.copyfile(picture(voc, image), out / "images" / split / f"{image}.jpg")
            (out / "labels" / split / f"{image}.txt").write_text("".join(lines), encoding="utf-8")
    entries = [*(f"{split}: images/{split}" for split in splits), "names:"]
    entries += [f"  {number}: {name}" for number, name in enumerate(names)]
    (out / "data.yaml").write_text("\n".join(["path: .", *entries]) + "\n", encoding="utf-8")


def picture(voc: Path, image: str) -> Path:
    """The file of an image."""
    return voc / "JPEGImages" / f"{image}.jpg"


def read_annotation(path: Path, names: Sequence[str]) -> tuple[list[str], int]:
    """Label lines `class cx cy w h` in shares of the image, and the number of boxes without area.

    Raises:
        ValueError: it is not a VOC annotation, or has an unknown class.
        FileNotFoundError: there is no such file.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes: not an annotation.")
    try:
        root = ElementTree.fromstring(path.read_bytes())
        width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        objects = [
            (
                item.findtext("name", ""),
                [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")],
            )
            for item in root.iter("object")
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path} is not a VOC annotation: {error}") from error
    if not (width > 0 and height > 0):
        raise ValueError(f"{path} states an image of {width:g} x {height:g} pixels.")
    lines = []
    for name, (x1, y1, x2, y2) in objects:
        if name not in names:
            raise ValueError(f"{path} has the class '{name}': expected one of {', '.join(names)}.")
        x1, x2 = (min(max(x, 0.0), width) / width for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), height) / height for y in (y1, y2))
        if x2 > x1 and y2 > y1:
            box = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
            lines.append(" ".join([str(names.index(name)), *(f"{value:.6f}" for value in box)]) + "\n")
    return lines, len(objects) - len(lines)


if __name__ == "__main__":
    sys.exit(main())
