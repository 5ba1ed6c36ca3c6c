"""Look at a dataset before a run does: `python -m data DATASET [--split NAME ...] [--segments] [--json FILE]`.

DATASET is a folder or a data.yaml. For each split it prints how much there is, by class, everything on disk that is not
used, and every error with its file and line, then images that occur twice. The last line of stdout says whether a run
would take it. Exit code 0: yes. 2: wrong arguments. 3: no.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.choices import DANGLING_LINKS
from core.command import command_parser, path_argument, reports_errors
from core.errors import EXIT_INPUT, EXIT_OK, DataError
from core.files import write_json
from core.names import printable
from data.classes import class_positions
from data.dataset import FORMATS, DetectionDataset, find_splits, open_dataset
from data.duplicates import find_copies
from data.inventory import Inventory

EXAMPLES = (
    "%(prog)s datasets/bccd",
    "%(prog)s datasets/mine/data.yaml --split val --segments --json data.json",
)
SIZES_SHOWN = 3
DEFAULT_PLACES = 3


@dataclass(frozen=True)
class Look:
    """What was found in a split.

    Attributes:
        split: its name.
        dataset: its images; None where it cannot be opened at all.
        inventory: what was left out, and what is wrong.
    """

    split: str
    dataset: DetectionDataset | None
    inventory: Inventory

    def facts(self) -> dict[str, Any]:
        """Counts, notes and faults, as plain data."""
        found: dict[str, Any] = {
            "notes": [
                {"text": note.sentence(), "number": note.number, "places": note.examples}
                for note in self.inventory.notes.values()
            ],
            "faults": self.inventory.faults,
        }
        if self.dataset is None:
            return found
        records, names = self.dataset.records, self.dataset.names
        labels = np.concatenate([np.zeros(0, np.int64), *(record.labels for record in records)])
        counts = np.bincount(labels, minlength=len(names)).tolist()
        return {
            "images": len(records),
            "objects": len(labels),
            "images_without_objects": sum(not len(record.labels) for record in records),
            "crowds": int(sum(record.crowd.sum() for record in records)),
            "objects_by_class": dict(zip(names, counts, strict=True)),
            "sizes": Counter("{} x {}".format(*record.size) for record in records).most_common(),
            **found,
        }


@reports_errors
def main(arguments: Sequence[str] | None = None, program: str = "python -m data") -> int:
    """Run the command; returns the exit code."""
    options = _parser(program).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    splits = options.split or find_splits(options.dataset, options.format) or ["val"]
    looks = [_look(options, split) for split in splits]
    between = list(_between(looks))
    for look in looks:
        print(printable("\n".join(_lines(look, options.places))), end="\n\n")
    for line in between:
        print(printable(line))
    if options.json is not None:
        facts = {look.split: look.facts() for look in looks}
        write_json(
            options.json, {"dataset": str(options.dataset), "splits": facts, "between_splits": between}
        )
    num_faults = sum(len(look.inventory.faults) for look in looks)
    num_notes = sum(note.is_warning for look in looks for note in look.inventory.notes.values()) + len(
        between
    )
    if num_faults:
        print(f"{options.dataset}: {num_faults} faults; a run would refuse it")
        return EXIT_INPUT
    print(f"{options.dataset}: usable" + (f", with {num_notes} warnings" if num_notes else ""))
    return EXIT_OK


def _look(options: argparse.Namespace, split: str) -> Look:
    inventory = Inventory(collects=True, max_examples=max(options.places, 1))
    dataset = None
    try:
        dataset = open_dataset(
            options.dataset,
            split,
            format=options.format,
            segments=options.segments,
            links=options.dangling_links,
            inventory=inventory,
        )
    except DataError as error:
        inventory.fault(str(error))
    return Look(split, dataset, inventory)


def _lines(look: Look, places: int) -> Iterator[str]:
    facts = look.facts()
    if "images" in facts:
        crowds = f", {facts['crowds']} of them crowds" if facts["crowds"] else ""
        yield (
            f"{look.split}: {facts['images']} images, {facts['objects']} objects{crowds}, "
            f"{facts['images_without_objects']} images without objects"
        )
        counts = enumerate(facts["objects_by_class"].items())
        yield "  classes: " + ", ".join(f"{index} {name} {number}" for index, (name, number) in counts)
        sizes = [f"{size} ({number})" for size, number in facts["sizes"][:SIZES_SHOWN]]
        more = (
            f", and {len(facts['sizes']) - SIZES_SHOWN} others" if len(facts["sizes"]) > SIZES_SHOWN else ""
        )
        yield f"  height x width: {', '.join(sizes)}{more}"
    else:
        yield f"{look.split}: cannot be opened"
    for note in look.inventory.notes.values():
        yield f"  {'warning' if note.is_warning else 'note'}: {note.sentence()}"
        yield from (f"      {place}" for place in note.examples[1:places] if place)
    yield from (f"  error: {fault}" for fault in look.inventory.faults)


def _between(looks: Sequence[Look]) -> Iterator[str]:
    """What is wrong between splits, and images that occur twice."""
    opened = [(look.split, look.dataset) for look in looks if look.dataset is not None]
    for split, dataset in opened[1:]:
        first, reference = opened[0]
        positions = class_positions(dataset.names, reference.names)
        if positions != list(range(len(reference.names))):
            how = "have other names than" if positions is None else "are in another order than"
            yield f"warning: the classes of {split} {how} those of {first}"
    places = [(split, record.path) for split, dataset in opened for record in dataset.records]
    for splits, groups in find_copies(places).items():
        where = f"within {splits[0]}" if len(splits) == 1 else f"in {' and '.join(splits)} alike"
        first_group = ", ".join(str(path) for path in groups[0][:2])
        yield f"warning: {len(groups)} images occur more than once {where}; the first: {first_group}"


def _parser(program: str) -> argparse.ArgumentParser:
    parser = command_parser(program, "Check a dataset: print its content and its faults.", EXAMPLES)
    parser.add_argument("dataset", type=path_argument, help="folder of a dataset, or a YOLO data.yaml")
    parser.add_argument(
        "--split", action="append", help="may be repeated; default: those that the dataset names"
    )
    parser.add_argument("--format", choices=FORMATS, default="auto", help="default: auto looks")
    parser.add_argument(
        "--segments", action="store_true", help="also check the masks, for a segmentation network"
    )
    parser.add_argument(
        "--dangling-links", choices=DANGLING_LINKS, default="error", help="as the setting data.dangling_links"
    )
    parser.add_argument("--places", type=int, default=DEFAULT_PLACES, help="places shown for each warning")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser
