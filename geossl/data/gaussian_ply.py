"""Gaussian splats in the PLY layout of the original 3D Gaussian Splatting code, which splat viewers and editors read.

One vertex per Gaussian, of float32 properties: ``x y z``, ``nx ny nz`` (0), ``f_dc_0..2`` (spherical harmonics of degree 0),
``f_rest_*`` (the others, all of red, then green, then blue), ``opacity`` (logit), ``scale_0..2`` (logarithms) and ``rot_0..3``
(quaternion wxyz).
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch

from geossl.data.files import atomic_write, existing
from geossl.errors import DataError
from geossl.geometry import Gaussians

_TYPES = {
    **{name: "f4" for name in ("float", "float32")},
    **{name: "f8" for name in ("double", "float64")},
    **{name: "i1" for name in ("char", "int8")},
    **{name: "u1" for name in ("uchar", "uint8")},
    **{name: "i2" for name in ("short", "int16")},
    **{name: "u2" for name in ("ushort", "uint16")},
    **{name: "i4" for name in ("int", "int32")},
    **{name: "u4" for name in ("uint", "uint32")},
}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
_NEEDED = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", *(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4)))
_HEADER_LINES = 1000
_SMALLEST_SCALE = 1e-12
_OPACITY_MARGIN = 1e-6  # logits of 0 and 1 are infinite


def _read_header(path: Path, file: IO[bytes]) -> tuple[str, int, list[tuple[str, str]]]:
    """Return byte order, number of vertices and (name, type) of their properties."""
    if file.readline().strip() != b"ply":
        raise DataError(f"{path}: is no PLY file; it does not begin with 'ply'")
    order, count, element = "", -1, ""
    properties: list[tuple[str, str]] = []
    for _ in range(_HEADER_LINES):
        line = file.readline()
        if not line.endswith(b"\n"):
            break
        words = line.decode("ascii", "replace").split()
        if words == ["end_header"]:
            if order not in _ORDERS or count < 0:
                raise DataError(f"{path}: its header lacks the format or the vertices")
            return _ORDERS[order], count, properties
        if words[:1] == ["format"] and len(words) > 1:
            order = words[1]
            if order not in _ORDERS:
                raise DataError(f"{path}: its format {order!r} is not known; known are {', '.join(_ORDERS)}")
        elif words[:1] == ["element"] and len(words) == 3:
            if count < 0 and words[1] != "vertex":
                raise DataError(f"{path}: its first element is {words[1]!r}, but Gaussians are vertices")
            element = words[1]
            if element == "vertex":
                if not words[2].isdecimal():
                    raise DataError(f"{path}: its number of vertices is {words[2]!r}")
                count = int(words[2])
        elif words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES:
                raise DataError(f"{path}: the property {' '.join(words[1:])!r} of its vertices cannot be read")
            properties.append((words[2], _TYPES[words[1]]))
    raise DataError(f"{path}: its header has no end; the file is truncated or of another kind")


def _check(path: Path, means: torch.Tensor, quats: torch.Tensor, scales: torch.Tensor, opacities: torch.Tensor, sh: torch.Tensor) -> None:
    """Refuse Gaussians that could not be drawn, with the first row of each kind."""
    numbers = (means, quats, scales, opacities[:, None], sh.flatten(1))
    for wrong, what in (
        (~torch.stack([t.isfinite().all(1) for t in numbers]).all(0), "hold numbers that are not finite"),
        (quats.abs().amax(1) < torch.finfo(quats.dtype).tiny, "have the quaternion 0, which is no rotation"),
        ((scales < 0).any(1), "have negative scales; scales are standard deviations, of logarithms take exp"),
        ((opacities < 0) | (opacities > 1), "have opacities outside [0, 1]; of logits take sigmoid"),
    ):
        rows = wrong.nonzero().flatten()
        if len(rows):
            raise DataError(f"{path}: {len(rows)} Gaussians {what}; the first is in row {int(rows[0])}; leave them out")


def read_gaussians(path: Path | str) -> Gaussians:
    """Read Gaussians from a PLY file of the usual layout, binary of either byte order or text; properties may have any order and type.

    Returns:
        float32 Gaussians with activations applied: opacities in [0, 1], scales as standard deviations, quaternions as they are.

    Raises:
        DataError: the file is missing, truncated, of another kind (a mesh, a point cloud), or lacks a property (the message
            names it), or a Gaussian could not be drawn: a number is not finite, or the quaternion is 0.
    """
    path = existing(path, "PLY file")
    try:
        with path.open("rb") as file:
            order, count, properties = _read_header(path, file)
            names = [name for name, _ in properties]
            missing = [name for name in _NEEDED if name not in names]
            if missing:
                raise DataError(
                    f"{path}: holds no Gaussians; its vertices lack {', '.join(missing)} and have {', '.join(names) or 'nothing'}"
                )
            if len(set(names)) != len(names):
                raise DataError(f"{path}: a property of its vertices occurs twice: {', '.join(names)}")
            if order:
                layout = np.dtype([(name, order + kind) for name, kind in properties])
                data = file.read(count * layout.itemsize)
                if len(data) != count * layout.itemsize:
                    raise DataError(f"{path}: is truncated; {count} Gaussians need {count * layout.itemsize} bytes, {len(data)} are left")
                rows = np.frombuffer(data, layout)
                columns = {name: np.asarray(rows[name], np.float32) for name in names}
            else:
                lines = [file.readline() for _ in range(count)]
                table = np.array([line.split() for line in lines], np.float32).reshape(count, len(names))
                columns = dict(zip(names, table.T, strict=True))
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as PLY; it is damaged, truncated or of another kind ({error})") from error
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in names for i in range(rest)):
        raise DataError(f"{path}: has {rest} properties f_rest_*, but spherical harmonics of degree 0 to 3 have 0, 9, 24 or 45")

    def gather(*wanted: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([columns[name] for name in wanted], 1) if wanted else np.empty((count, 0), np.float32))

    others = gather(*(f"f_rest_{i}" for i in range(rest))).view(count, 3, rest // 3).mT
    gaussians = Gaussians(
        means=gather("x", "y", "z"),
        quats=gather(*(f"rot_{i}" for i in range(4))),
        scales=gather(*(f"scale_{i}" for i in range(3))).exp(),
        opacities=gather("opacity")[:, 0].sigmoid(),
        sh=torch.cat([gather("f_dc_0", "f_dc_1", "f_dc_2")[:, None], others], 1),
    )
    _check(path, gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh)
    return gaussians


def write_gaussians(path: Path | str, gaussians: Gaussians) -> None:
    """Write Gaussians as a binary PLY file that splat viewers open.

    Quaternions are normalised; opacities are kept a millionth away from 0 and 1, whose logits are infinite, and scales at least 1e-12.

    Raises:
        DataError: a number is not finite, a quaternion is 0, a scale negative, an opacity outside [0, 1], or the file cannot be written.
    """
    path = Path(path)
    means, quats, scales, opacities, sh = (
        t.detach().float().cpu() for t in (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh)
    )
    _check(path, means, quats, scales, opacities, sh)
    opacities = opacities.double().clamp(_OPACITY_MARGIN, 1 - _OPACITY_MARGIN)
    columns = torch.cat(
        [
            means,
            torch.zeros_like(means),
            sh[:, 0],
            sh[:, 1:].mT.flatten(1),
            torch.logit(opacities).float()[:, None],
            scales.clamp(min=_SMALLEST_SCALE).log(),
            torch.nn.functional.normalize(quats / quats.abs().amax(1, keepdim=True), dim=1),
        ],
        1,
    )
    rest = 3 * (sh.shape[1] - 1)
    names = [
        *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
        *(f"f_rest_{i}" for i in range(rest)),
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    ]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(columns)}", *(f"property float {name}" for name in names)]
    data = "\n".join([*lines, "end_header", ""]).encode() + columns.numpy().astype("<f4").tobytes()
    atomic_write(path, lambda file: file.write(data))
