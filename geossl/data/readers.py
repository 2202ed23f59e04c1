"""Reading one point cloud or mesh from a file: PLY, OBJ, OFF, STL, GLB, XYZ, TXT, CSV, PTS, NPY, NPZ, HDF5."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from geossl.data.files import check_finite, existing, read_h5, read_npz
from geossl.data.sample import COLUMN_NAMES, Columns, PointCloud
from geossl.errors import DataError

TEXT_SUFFIXES = (".xyz", ".txt", ".csv", ".pts")
MESH_SUFFIXES = (".ply", ".obj", ".off", ".stl", ".glb", ".gltf")
SUFFIXES = (*TEXT_SUFFIXES, *MESH_SUFFIXES, ".npy", ".npz", ".h5", ".hdf5")

# Names under which files keep what we call coord, normal and color.
_COORD_KEYS = ("coord", "xyz", "points", "pos", "data")
_NORMAL_KEYS = ("normal", "normals")
_COLOR_KEYS = ("color", "colors", "rgb")
_PLAIN_GREY = 0.8  # parts without a colour, in a mesh of which other parts have one


def read_points(
    path: Path | str, *, columns: Columns | Literal["auto"] = "auto", mesh_points: int = 8192, center: bool = False
) -> PointCloud:
    """Read a point cloud as it is, or sample a mesh by area.

    Meshes (PLY, OBJ, OFF, STL, GLB with faces) are sampled with a seed made from the file's name, so a file always gives the same points;
    normals are those of the faces, colours those of texture, vertices or faces. Text and NPY files have 3, 6 or 9 columns; PTS
    files may also have x y z intensity (dropped) with or without red green blue. NPZ and HDF5 files hold an array ``coord``
    (or ``xyz``, ``points``, ``pos``, ``data``), and optionally ``normal(s)`` and ``color(s)`` or ``rgb``.

    Args:
        path: The file; its suffix says its kind.
        columns: What the columns of a text or NPY file are. ``auto``: columns 4-6 (and 7-9) are normals if their rows have length 1,
            else colours if they lie in 0..1 or 0..255.
        mesh_points: Points drawn from a mesh.
        center: Subtract the middle of the bounding box before rounding to float32 (needed for map coordinates).

    Returns:
        coord ``[N, 3]`` float32 in the file's own units and axes; normal and color (0..1) where the file has them.

    Raises:
        DataError: the file is missing, damaged or of an unknown kind, has fewer than two points, wrong columns or rows that are not finite;
            the message names the file and the row.
    """
    path = existing(path)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        values = _pts_columns(read_number_table(path)) if suffix == ".pts" else read_number_table(path)
        coord, normal, color = split_columns(values, columns, str(path))
    elif suffix == ".npy":
        coord, normal, color = split_columns(_read_npy(path), columns, str(path))
    elif suffix == ".npz":
        coord, normal, color = _from_keys(read_npz(path), path)
    elif suffix in (".h5", ".hdf5"):
        coord, normal, color = _from_keys(read_h5(path), path)
    elif suffix in MESH_SUFFIXES:
        coord, normal, color = _read_mesh(path, mesh_points)
    else:
        raise DataError(f"{path}: files ending in {suffix!r} cannot be read; supported are {', '.join(SUFFIXES)}")
    return checked_cloud(coord, normal, color, str(path), center=center)


def checked_cloud(
    coord: np.ndarray, normal: np.ndarray | None, color: np.ndarray | None, source: str, *, center: bool = False
) -> PointCloud:
    """Check shapes and values, bring colours to 0..1 and everything to float32, and return the cloud.

    Raises:
        DataError: see :func:`read_points`; the message starts with ``source``.
    """
    for name, values in (("coord", coord), ("normal", normal), ("color", color)):
        if values is None:
            continue
        if values.ndim != 2 or values.shape[1] != 3 or len(values) != len(coord):
            raise DataError(f"{source}: {name} must be [{len(coord)}, 3], got {list(values.shape)}")
        if values.dtype.kind not in "fiu":
            raise DataError(f"{source}: {name} must be numbers, got {values.dtype}")
    if len(coord) < 2:
        raise DataError(f"{source}: a point cloud needs at least 2 points, got {len(coord)}")
    check_finite(source, coord=coord, normal=normal, color=color)
    if center or coord.dtype.itemsize > 4:
        low, high = coord.min(axis=0).astype(np.float64), coord.max(axis=0).astype(np.float64)
        largest = np.abs([low, high]).max()
        if center:
            coord = coord - (low + high) / 2.0
        elif largest * 2.0**-24 > 1e-4 * np.linalg.norm(high - low) > 0.0:
            raise DataError(f"{source}: coordinates up to {largest:.7g} lose their detail in float32; subtract an offset (center=True)")
    if color is not None:
        color = color.astype(np.float32) / np.float32(255.0 if color.dtype.kind in "iu" or color.max() > 1.0 else 1.0)
        if color.min() < 0.0 or color.max() > 1.0:
            raise DataError(f"{source}: colours must lie in 0..1 or 0..255, they reach from {color.min():g} to {color.max():g}")
    normal = None if normal is None else normal.astype(np.float32)
    return PointCloud(np.ascontiguousarray(coord, dtype=np.float32), normal, color)


def split_columns(
    values: np.ndarray, columns: Columns | Literal["auto"], source: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Cut a table ``[N, 3 | 6 | 9]`` into coord, normal and color.

    Raises:
        DataError: the number of columns is another, or ``auto`` cannot tell normals from colours.
    """
    if values.ndim != 2:
        raise DataError(f"{source}: expected a table [N, 3], [N, 6] or [N, 9], got an array {list(values.shape)}")
    width = values.shape[1]
    if columns == "auto":
        if width not in (3, 6, 9):
            raise DataError(f"{source}: has {width} columns; expected 3 (xyz), 6 (xyz, normal or rgb) or 9 (xyz, normal, rgb)")
        kinds = [_column_kind(values[:, start : start + 3], source, start) for start in range(3, width, 3)]
        if len(set(kinds)) < len(kinds):
            raise DataError(f"{source}: columns 4-6 and 7-9 both look like {kinds[0]}; say what they are with columns=...")
    else:
        kinds = list(COLUMN_NAMES[columns][1:])
        if width != 3 + 3 * len(kinds):
            raise DataError(f"{source}: has {width} columns, but columns={columns!r} means {3 + 3 * len(kinds)}")
    parts = {kind: values[:, 3 + 3 * i : 6 + 3 * i] for i, kind in enumerate(kinds)}
    return values[:, :3], parts.get("normal"), parts.get("rgb")


def _column_kind(values: np.ndarray, source: str, start: int) -> str:
    """Tell three columns of unit normals from three of colours."""
    length = np.linalg.norm(np.nan_to_num(values[:1000].astype(np.float64)), axis=1)
    if (np.abs(length - 1.0) < 0.02).mean() > 0.95:
        return "normal"
    if np.nanmin(values, initial=0.0) >= 0.0 and np.nanmax(values, initial=0.0) <= 255.0:
        return "rgb"
    raise DataError(
        f"{source}: columns {start + 1}-{start + 3} are neither unit normals nor colours (0..1 or 0..255); keep only xyz in the file, "
        "or say what they are with columns='xyz+normal' or 'xyz+rgb'"
    )


def read_number_table(path: Path) -> np.ndarray:
    """Read a table of numbers, separated by blanks, commas or semicolons; one header line and # or // comments are skipped."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line for line in file if line.strip() and not line.lstrip().startswith(("#", "//"))]
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: is not a readable text file ({error})") from error
    first = lines[0].replace(",", " ").replace(";", " ").split() if lines else []
    if len(first) == 1 or (first and not _is_number(first[0])):
        lines = lines[1:]  # the number of points, as in PTS files, or the names of the columns
    if not lines:
        raise DataError(f"{path}: a point cloud needs at least 2 points, the file has none")
    separator = "," if "," in lines[0] else ";" if ";" in lines[0] else None
    try:
        return np.loadtxt(lines, delimiter=separator, ndmin=2, dtype=np.float64, comments=None)
    except ValueError as error:
        raise DataError(f"{path}: is not a table of numbers, or it is truncated ({error})") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pts_columns(values: np.ndarray) -> np.ndarray:
    """Drop the intensity of a PTS table: x y z i [r g b]."""
    return np.delete(values, 3, axis=1) if values.shape[1] in (4, 7) else values


def _read_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as npy; it is damaged, truncated or holds Python objects ({error})") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise DataError(f"{path}: expected an array of numbers, got {getattr(values, 'dtype', type(values).__name__)}")
    return values


def _from_keys(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Pick coord, normal and color out of named arrays."""
    found = [next((arrays[key] for key in keys if key in arrays), None) for keys in (_COORD_KEYS, _NORMAL_KEYS, _COLOR_KEYS)]
    coord, normal, color = found
    if coord is None:
        raise DataError(f"{path}: none of the arrays {', '.join(_COORD_KEYS)} is in it; it holds {', '.join(arrays) or 'nothing'}")
    if coord.ndim == 3:
        raise DataError(f"{path}: holds {len(coord)} clouds {list(coord.shape)}; read_points reads files of one cloud [N, 3]")
    return coord, normal, color


def _read_mesh(path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Sample the faces of a mesh file, or return its vertices if it has none."""
    import trimesh

    try:
        loaded: Any = trimesh.load(path, process=False)
    except Exception as error:  # the parsers raise anything, even ImportError, on a damaged file
        raise DataError(f"{path}: cannot be read as {path.suffix[1:].upper()}; it is damaged or truncated ({error})") from error
    if isinstance(loaded, trimesh.PointCloud):
        return _vertices(loaded)
    parts = _mesh_parts(loaded)
    areas = [float(part.area) for part in parts]
    if not parts:
        raise DataError(f"{path}: has neither faces nor points; it is empty, damaged or truncated")
    for part in parts:
        check_finite(str(path), vertices=np.asarray(part.vertices))
    if not sum(areas) > 0.0:
        raise DataError(f"{path}: all its faces have no area, so no points can be drawn from them")
    rng = np.random.default_rng(name_seed(path.name))
    counts = rng.multinomial(count, np.array(areas) / sum(areas))
    samples = [_sample_faces(part, int(share), rng) for part, share in zip(parts, counts, strict=True) if share]
    order = rng.permutation(count)  # so that every prefix is a sample of the whole surface
    coord = np.concatenate([sample[0] for sample in samples])[order]
    normal = np.concatenate([sample[1] for sample in samples])[order]
    if all(sample[2] is None for sample in samples):
        return coord, normal, None
    colors = [np.full_like(sample[0], _PLAIN_GREY) if sample[2] is None else sample[2] for sample in samples]
    return coord, normal, np.concatenate(colors)[order]


def name_seed(name: str) -> int:
    """Return a seed made from a file's name: the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mesh_parts(loaded: Any) -> list[Any]:
    """Return the meshes with faces of a loaded file, placed as its scene graph says."""
    import trimesh

    if isinstance(loaded, trimesh.Trimesh):
        return [loaded] if len(loaded.faces) else []
    parts = []
    for node in sorted(loaded.graph.nodes_geometry):
        matrix, name = loaded.graph[node]
        part = loaded.geometry[name]
        if isinstance(part, trimesh.Trimesh) and len(part.faces):
            parts.append(part.copy().apply_transform(matrix))
    return parts


def _vertices(cloud: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return the points of a file without faces; normals are found among the columns of a PLY."""
    color = np.asarray(cloud.colors)[:, :3] if len(cloud.colors) == len(cloud.vertices) > 0 else None
    fields = cloud.metadata.get("_ply_raw", {}).get("vertex", {}).get("data", {})
    names = ("nx", "ny", "nz")
    has_normal = all(name in fields for name in names) if isinstance(fields, dict) else set(names) <= set(fields.dtype.names or ())
    normal = np.stack([np.asarray(fields[name]).reshape(-1) for name in names], axis=1) if has_normal else None
    return np.asarray(cloud.vertices), normal, color


def _sample_faces(mesh: Any, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Draw ``count`` points uniformly by area: coord, normal ``[count, 3]`` and color in 0..1 or None."""
    cumulative = np.cumsum(mesh.area_faces)
    face = np.minimum(np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right"), len(cumulative) - 1)
    root, second = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack([1.0 - root, root * (1.0 - second), root * second], axis=1)  # uniform over a triangle
    corners = np.asarray(mesh.triangles)[face]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    return np.einsum("nk,nkc->nc", weights, corners), normal, _face_colors(mesh, face, weights)


def _face_colors(mesh: Any, face: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """Return the colour ``[count, 3]`` in 0..1 at points on ``face`` with barycentric ``weights``, or None if the mesh has none."""
    visual = mesh.visual
    if visual.kind == "texture":
        material = visual.material
        image = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
        if image is None or visual.uv is None:
            return np.broadcast_to(np.asarray(material.main_color[:3]) / 255.0, (len(face), 3))
        pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        u, v = np.moveaxis(np.einsum("nk,nkc->nc", weights, np.asarray(visual.uv)[mesh.faces[face]]) % 1.0, -1, 0)
        row, column = ((1.0 - v) * height).astype(int), (u * width).astype(int)
        return pixels[np.minimum(row, height - 1), np.minimum(column, width - 1)] / 255.0
    if visual.kind == "vertex":
        return np.einsum("nk,nkc->nc", weights, visual.vertex_colors[mesh.faces[face]][..., :3] / 255.0)
    if visual.kind == "face":
        return visual.face_colors[face, :3] / 255.0
    return None
