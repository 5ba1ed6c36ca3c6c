"""Pictures to look at, from an image, a folder or a video; and where they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

from core.errors import DataError
from core.files import make_folder
from data import list_images, read_image

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
DEFAULT_RATE = 25.0

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """What is looked at.

    Attributes:
        path: an image, a folder of images, or a video.
        images: image files; empty for a video.
        total: pictures in it; for a video what its header says.
        rate: pictures a second, of a video only.
    """

    path: Path
    images: tuple[Path, ...]
    total: int
    rate: float | None = None

    def pictures(self) -> Iterator[tuple[str, Picture]]:
        """(name, uint8 [H, W, 3] RGB) of every picture; the name is the path below the folder, or a frame's number."""
        if self.rate is not None:
            yield from _frames(self.path)
            return
        base = self.path if self.path.is_dir() else self.path.parent
        for image in self.images:
            yield image.relative_to(base).as_posix(), read_image(image)


def open_source(path: Path) -> Source:
    """Find out what `path` is.

    Raises:
        DataError: nothing there, no pictures in it, or a video that cannot be decoded.
    """
    if not path.exists():
        raise DataError(f"Nothing at {path}: expected an image, a folder of images or a video.")
    if path.suffix.lower() not in VIDEO_SUFFIXES or path.is_dir():
        images = tuple(list_images(path))
        if not images:
            raise DataError(f"No image in {path}.")
        return Source(path, images, len(images))
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise DataError(
                f"{path} cannot be decoded as a video; convert it, or give its frames as a folder."
            )
        total, rate = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    return Source(path, (), max(int(total), 0), rate if 0 < rate < 1000 else DEFAULT_RATE)


def _frames(path: Path) -> Iterator[tuple[str, Picture]]:
    capture = cv2.VideoCapture(str(path))
    number = 0
    try:
        while True:
            success, frame = capture.read()
            if not success:
                break
            number += 1
            yield f"frame {number}", np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
    finally:
        capture.release()
    if not number:
        raise DataError(f"{path} has no frame that can be decoded.")


class PictureWriter:
    """Writes pictures below a folder: PNG files, or one MP4 video for a video."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder = folder
        self.source = source
        self.paths: list[Path] = []
        self._video: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, name: str, picture: Picture) -> None:
        """Write one picture, uint8 [H, W, 3] RGB.

        Raises:
            DataError, WriteError: the file or its folder cannot be written.
        """
        frame = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
        if self.source.rate is not None:
            self._write_frame(np.asarray(frame, np.uint8), self.source.rate)
            return
        path = (self.folder / name).with_suffix(".png")
        if path in self.paths:  # a.jpg and a.bmp in one folder
            path = self.folder / f"{name}.png"
        make_folder(path.parent)
        if not cv2.imwrite(str(path), frame):
            raise DataError(f"{path} cannot be written.")
        self.paths.append(path)

    def _write_frame(self, frame: Picture, rate: float) -> None:
        if self._video is None:
            path = self.folder / f"{self.source.path.stem}.mp4"
            make_folder(path.parent)
            self._size = (frame.shape[1], frame.shape[0])
            self._video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, self._size)
            if not self._video.isOpened():
                raise DataError(f"{path} cannot be written: this OpenCV has no MP4 encoder.")
            self.paths.append(path)
        if (frame.shape[1], frame.shape[0]) != self._size:  # some videos change their size
            frame = np.asarray(cv2.resize(frame, self._size), np.uint8)
        self._video.write(frame)

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._video is not None:
            self._video.release()
