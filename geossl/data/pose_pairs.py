"""Pairs of images of posed sequences, with the motion between their cameras: 7-Scenes and ScanNet as they are published."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from geossl.config import require
from geossl.data.dataset import DATASETS
from geossl.data.files import existing, read_lines
from geossl.data.image_augment import ColorJitterConfig, jitter_pair
from geossl.data.pairs import PairDataset
from geossl.data.sample import ImageSample
from geossl.data.scene import read_image
from geossl.data.scene_readers import RGBDFolderConfig, RGBDFolderDataset
from geossl.errors import DataError
from geossl.geometry import invert_pose, normalize_images


@dataclass(kw_only=True)
class PosePairsConfig:
    """Pairs of frames of posed sequences.

    ``root`` is a scene of 7-Scenes (``seq-01`` ... with ``TrainSplit.txt`` and ``TestSplit.txt``), or one folder of frames, which then is
    every part. Frames without a pose are left out, see the scene data set ``rgbd_folder``.

    A training sample is a frame and another one up to ``gap`` frames away, before or after it, with colour changes. The test part has each
    ``step``-th frame and the next of them, so that the motions of a sequence make its whole trajectory.
    """

    name: str = "pose_pairs"
    """Registered name of the data set."""
    root: Path = Path("data/7scenes/chess")
    """Folder of the sequences, or of the frames of one."""
    height: int = 224
    """Rows that images are resized to."""
    width: int = 288
    """Columns that images are resized to."""
    gap: int = 60
    """Training: largest distance of the two frames."""
    step: int = 20
    """Test: distance of the two frames."""
    augment: ColorJitterConfig = field(default_factory=ColorJitterConfig)
    """Colour changes of training samples."""
    damaged: Literal["skip", "error"] = "skip"
    """A training pair that cannot be used: take the next one in its place, with a warning that counts, or stop. The test part always stops:
    its motions make a trajectory."""

    def __post_init__(self) -> None:
        for key in ("height", "width"):
            require(getattr(self, key) >= 8, key, "must be at least 8", getattr(self, key))
        for key in ("gap", "step"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        require(self.damaged in ("skip", "error"), "damaged", "must be skip or error", self.damaged)

    def describe(self) -> str:
        """Return what a sample is, in words."""
        return f"pairs of frames of {self.width} x {self.height} pixels with the motion between their cameras"

    def build(self, split: str = "train") -> PosePairsDataset:
        """Make the data set of ``split``: ``train`` or ``test``."""
        return PosePairsDataset(self, split)


@DATASETS.register
def pose_pairs() -> PosePairsConfig:
    """Pairs of frames of 7-Scenes or ScanNet with the motion between their cameras."""
    return PosePairsConfig()


class PosePairsDataset(PairDataset):
    """See :class:`PosePairsConfig`.

    Attributes:
        chains: Of each sequence of the test part the rows that follow each other: the second frame of one is the first of the next.
    """

    config: Any

    def __init__(self, config: PosePairsConfig, split: str) -> None:
        if split not in ("train", "test"):
            raise DataError(f"pose_pairs: unknown split {split!r}; choose one of train, test")
        self.sequences = [
            RGBDFolderDataset(RGBDFolderConfig(root=folder, views=1, points=0)) for folder in sequences_of(config.root, split)
        ]
        pairs: list[tuple[int, int, int]] = []  # sequence, frame, the other frame in the evaluation form
        self.chains: list[np.ndarray] = []
        for number, sequence in enumerate(self.sequences):
            count, step = len(sequence.frames), config.step
            firsts = range(0, count - step, step) if split == "test" else range(count if count > 1 else 0)
            if split == "test":
                self.chains.append(np.arange(len(pairs), len(pairs) + len(firsts)))
            pairs += [(number, i, i + step if i + step < count else i - 1 if i else 1) for i in firsts]
        if not pairs:
            raise DataError(f"{config.root}: its sequences have no two frames {config.step} apart in the {split} part; lower step")
        self._pairs = np.array(pairs, dtype=np.int64)
        super().__init__(config if split == "train" else replace(config, damaged="error"), len(pairs))  # type: ignore[arg-type]

    def source(self, row: int) -> str:
        """Return what an error message calls pair ``row``."""
        number, first, second = self._pairs[row]
        sequence = self.sequences[number]
        return f"{sequence.config.root} ({sequence.frames[first]} and {sequence.frames[second]})"

    def _sample(self, row: int, rng: np.random.Generator | None) -> ImageSample:
        number, first, second = (int(value) for value in self._pairs[row])
        sequence, size = self.sequences[number], (self.config.width, self.config.height)
        if rng is not None:
            near = np.arange(max(first - self.config.gap, 0), min(first + self.config.gap + 1, len(sequence.frames)))
            second = int(rng.choice(near[near != first]))
        image, reference = (read_image(sequence.files(frame)[0], size)[0] for frame in (first, second))
        if rng is not None:
            image, reference = jitter_pair(image, reference, rng, self.config.augment)  # type: ignore[assignment]
        # In float64: positions in the world may be much larger than the motion.
        one, other = (sequence.poses[frame].double() for frame in (first, second))
        motion = (other @ invert_pose(one)).to(torch.float32)
        return ImageSample(normalize_images(image), row, normalize_images(reference), motion=motion)


def sequences_of(root: Path, split: str) -> list[Path]:
    """The folders of frames that belong to ``split``: those that a scene of 7-Scenes lists for it, or ``root`` itself.

    Raises:
        DataError: a folder or the list is missing, or the list is damaged.
    """
    listed = existing(root, "folder") / f"{split.capitalize()}Split.txt"
    if not listed.exists() and not any(root.glob("seq-*")):
        return [root]
    numbers = [re.fullmatch(r"sequence(\d+)", line.strip()) for line in read_lines(listed) if line.strip()]
    if not numbers or any(number is None for number in numbers):
        raise DataError(f"{listed}: expected a line such as 'sequence1' for every sequence")
    return [existing(root / f"seq-{int(number[1]):02d}", "folder") for number in numbers if number is not None]
