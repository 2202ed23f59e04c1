"""What a 2D teacher says of point clouds, and the store of it on disk.

The teacher looks at three depth images of each cloud (:mod:`geossl.layers.projection`). It is frozen, far larger than the encoder it
teaches, and no part of it: :class:`CloudTeacher` is no module, so it is in no state dict, moving average, optimiser or replica, and its
weights are read when it is first asked.

A store holds one file for each cloud, named by a hash of its points, in a folder named by the teacher and the projection:

    FOLDER/mobilenet_v2-b03531047ffacf1e-float32/three-views-224/ab/ab12....safetensors
        features  [3, C, h, w] float16
        saliency  [3, h * w] float32

Another cloud, teacher, precision or projection is another name, so nothing out of date is ever read. Files are written under a temporary
name and renamed, so any number of processes may share a store and be killed; they are mapped into memory to be read, and one whose
checksum is wrong is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from geossl.errors import ConfigError, DataError
from geossl.geometry import PackedPoints, Tokens
from geossl.layers.projection import VIEWS, ViewFrames, back_project, fit_views, project_views
from geossl.models.point_vit import packed_clouds
from geossl.models.teachers import Teacher, TeacherConfig, TeacherOutput
from geossl.ops import offsets_from_lengths

log = logging.getLogger("geossl")


class CloudOutput(NamedTuple):
    """What a teacher says of the three views of ``B`` clouds; view 1 of all clouds comes first."""

    features: Tensor  # [3B, C, h, w] float32
    saliency: Tensor  # how much each place of the map matters, [3B, h * w] float32
    frames: ViewFrames  # where points of the clouds are in the views


class CloudTeacher:
    """A 2D teacher that looks at clouds.

    Args:
        config: Which teacher; None: one is given later, to :meth:`use`.
        store: Folder that keeps what it says of clouds shown with ``fixed=True``; None keeps nothing.
        size: Rows and columns of the images.
    """

    def __init__(self, config: TeacherConfig | None, store: str | os.PathLike[str] | None = None, size: int = 224) -> None:
        self.config, self.size = config, size
        self.store = None if store is None else TeacherStore(store)
        self._teacher: Teacher | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CloudTeacher:
        """Return itself: copies of a method share one teacher."""
        return self

    def load(self) -> Teacher:
        """Return the 2D model, reading its weights when it is first asked.

        Raises:
            ConfigError: there is none.
            CheckpointError: see :meth:`TeacherConfig.build`.
        """
        if self._teacher is None:
            if self.config is None:
                raise ConfigError(
                    "this model has no 2D teacher, as official checkpoints are read without theirs; give it one with "
                    "model.teacher.use(geossl.methods.reference_teacher(file)) or model.teacher.use(TeacherConfig(...).build())"
                )
            self.use(self.config.build())
        assert self._teacher is not None
        return self._teacher

    def use(self, teacher: Teacher) -> None:
        """Take ``teacher`` from now on.

        Raises:
            ConfigError: outputs are to be stored, but nothing tells this teacher's weights from others.
        """
        if self.store is not None and not teacher.digest and teacher.name != "random":
            raise ConfigError(
                f"outputs of teacher {teacher.name!r} cannot be stored: it has no digest to know them by; give Teacher(digest=)"
            )
        self._teacher = teacher

    @torch.no_grad()
    def __call__(self, clouds: PackedPoints, *, fixed: bool = False) -> CloudOutput:
        """Look at clouds. What is said of a cloud does not depend on its batch.

        Args:
            clouds: Packed, coordinates float32.
            fixed: The clouds come again: their points are taken in an order that depends on nothing but the points, and features are
                rounded to half precision, whether they are stored or not.

        Raises:
            ValueError: a cloud has no point or one that is not finite.
            DataError: the store cannot be written.
        """
        with torch.autocast(clouds.coord.device.type, enabled=False):
            return self._answer(clouds, fixed)

    def _answer(self, clouds: PackedPoints, fixed: bool) -> CloudOutput:
        device = clouds.coord.device
        if not fixed:
            views = project_views(clouds, self.size)
            return CloudOutput(*self._look(views.images), views.frames)
        frames = fit_views(clouds, self.size)
        host = [_in_order(part) for part in clouds.coord.cpu().split(clouds.lengths.tolist())]
        found: list[TeacherOutput | None] = [None] * len(host)
        if self.store is not None:
            teacher = self.load()
            keys = [cloud_key(points) for points in host]
            found = [self.store.read(teacher, self.size, key) for key in keys]
        wanted = [i for i, known in enumerate(found) if known is None]
        if wanted:
            coord = torch.cat([host[i] for i in wanted]).to(device)
            offsets = offsets_from_lengths(torch.tensor([len(host[i]) for i in wanted])).to(device)
            features, saliency = self._look(project_views(PackedPoints(coord, offsets), self.size).images)
            halves = features.half()
            if not bool(halves.isfinite().all()):
                raise ValueError(f"features of teacher {self.load().name!r} do not fit half precision; let it look at the augmented clouds")
            halves, saliency = (x.unflatten(0, (VIEWS, len(wanted))).transpose(0, 1) for x in (halves, saliency))
            for i, made in zip(wanted, map(TeacherOutput, halves.unbind(), saliency.unbind()), strict=True):
                found[i] = made
                if self.store is not None:
                    self.store.write(teacher, self.size, keys[i], made)
        parts = zip(*(known for known in found if known is not None), strict=True)
        features, saliency = (torch.stack([x.to(device) for x in part], 1).flatten(0, 1).float() for part in parts)
        return CloudOutput(features, saliency, frames)

    def _look(self, images: Tensor) -> TeacherOutput:
        """Show the views cloud after cloud: on a CPU the teacher takes three at a time, so that no cloud feels another."""
        by_cloud = images.unflatten(0, (VIEWS, -1)).transpose(0, 1).flatten(0, 1)
        output = self.load().to(images.device)(by_cloud.float())
        features, saliency = (x.unflatten(0, (-1, VIEWS)).transpose(0, 1).flatten(0, 1) for x in output)
        return TeacherOutput(features, saliency)


class TeacherPoints(nn.Module):
    """The features of a 2D teacher as those of points: what any encoder that learned from it should beat.

    Every point has the features at its place in the three views, side by side. It goes where a frozen backbone goes: to
    :func:`geossl.extract_features` and to the probes.

    Args:
        teacher: The 2D model.
    """

    in_channels = 3

    def __init__(self, teacher: CloudTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    @torch.no_grad()
    def forward(self, points: PackedPoints | Tensor) -> Tokens:
        """Describe clouds: packed, or ``[B, N, 3]`` float32. Every point is a token, ``feats [M, 3C]``. No gradient."""
        clouds = packed_clouds(points, self.in_channels)
        seen = self.teacher(clouds)
        return Tokens(back_project(seen.features, clouds, seen.frames).flatten(1), clouds.coord, clouds.offsets)


class TeacherStore:
    """Outputs of teachers on disk; see the module's docstring.

    Args:
        root: Its folder; made when something is written.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path(self, teacher: Teacher, size: int, key: str) -> Path:
        """File of the cloud with :func:`cloud_key` ``key``."""
        return self.root / teacher.fingerprint.replace("/", "_") / f"three-views-{size}" / key[:2] / f"{key}.safetensors"

    def check_writable(self) -> None:
        """Make the folder, and try to write into it.

        Raises:
            DataError: it cannot be written.
        """
        probe = self.root / f".{uuid.uuid4().hex}.tmp"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise DataError(f"{self.root}: outputs of the teacher cannot be stored here ({error}); choose another teacher_store") from error

    def read(self, teacher: Teacher, size: int, key: str) -> TeacherOutput | None:
        """Return what is stored of a cloud: features ``[3, C, h, w]`` float16 and saliency ``[3, h * w]`` float32; None if nothing is.

        A file that is truncated or damaged counts as nothing, and a warning names it.
        """
        path = self.path(teacher, size, key)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                output = TeacherOutput(file.get_tensor("features"), file.get_tensor("saliency"))
                checksum = (file.metadata() or {}).get("crc32")
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("%s: damaged (%s); made again", path, error)
            return None
        if checksum != _checksum(output):
            log.warning("%s: damaged (its checksum is wrong); made again", path)
            return None
        return output

    def write(self, teacher: Teacher, size: int, key: str, output: TeacherOutput) -> None:
        """Store what ``teacher`` says of a cloud.

        Raises:
            DataError: the file cannot be written.
        """
        path = self.path(teacher, size, key)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        tensors = {name: value.contiguous().cpu() for name, value in output._asdict().items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save(tensors, {"crc32": _checksum(TeacherOutput(**tensors)), "teacher": teacher.fingerprint}))
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise DataError(f"{path}: could not be written ({error}); is the disk full? teacher_store: null stores nothing") from error


def cloud_key(points: Tensor) -> str:
    """Name of a cloud ``[N, 3]`` whose points are in order: a hash of their coordinates."""
    coord = points.float().numpy() + np.float32(0)  # turns -0 into 0
    return hashlib.blake2b(np.ascontiguousarray(coord).tobytes(), digest_size=20).hexdigest()


def fixed_cloud_key(points: Tensor) -> str:
    """Name of a cloud ``[N, 3]`` on the CPU, the same for every order of its points."""
    return cloud_key(_in_order(points))


def _in_order(points: Tensor) -> Tensor:
    """Sort the points of a cloud by x, then y, then z."""
    x, y, z = points.numpy().T
    return points[torch.from_numpy(np.lexsort((z, y, x)))]


def _checksum(output: TeacherOutput) -> str:
    value = 0
    for part in output:
        value = zlib.crc32(part.numpy().data, value)
    return f"{value:08x}"
