"""Readers of posed images, on tiny files in the published layouts and, where they are at hand, on real ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geossl.data import RGBDFolderConfig, SUNRGBDConfig, TransformsConfig
from geossl.errors import ConfigError, DataError
from geossl.geometry import invert_pose, look_at, project

EYES = [(0.0, -2.0, 1.5), (0.5, -2.0, 1.5), (1.0, -2.0, 1.5), (1.5, -2.0, 1.5)]


def pose(number: int) -> np.ndarray:
    """Camera to world, looking north at a wall at y = 0."""
    eye = torch.tensor(EYES[number % 4])
    return invert_pose(look_at(eye, eye + torch.tensor([0.0, 1.0, 0.0]))).numpy()


def write_frame(color: Path, depth: Path, where: Path, number: int, size: tuple[int, int] = (16, 12)) -> None:
    for path in (color, depth, where):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), (40 * number + 20) % 256, dtype=np.uint8)).save(color)
    millimetres = np.full((12, 16), 2000, dtype=np.uint16)
    millimetres[0, 0], millimetres[0, 1] = 0, 65535
    Image.fromarray(millimetres).save(depth)
    np.savetxt(where, pose(number))


@pytest.fixture
def seven_scenes(tmp_path: Path) -> Path:
    root = tmp_path / "chess" / "seq-01"
    for number in range(4):
        stem = f"frame-{number:06d}"
        write_frame(root / f"{stem}.color.png", root / f"{stem}.depth.png", root / f"{stem}.pose.txt", number)
    np.savetxt(root.parent / "camera-intrinsics.txt", [[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
    return root


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    root = tmp_path / "scene0000_00"
    for number in range(11):
        write_frame(root / f"color/{number}.jpg", root / f"depth/{number}.png", root / f"pose/{number}.txt", number, (32, 24))
    (root / "pose" / "2.txt").write_text("-inf -inf -inf -inf\n" * 4)
    (root / "intrinsic").mkdir()
    np.savetxt(root / "intrinsic" / "intrinsic_depth.txt", [[20.0, 0, 8, 0], [0, 20, 6, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    turn = "0 -1 0 5  1 0 0 0  0 0 1 0  0 0 0 1"
    (root / "scene0000_00.txt").write_text(f"sceneType = Apartment\naxisAlignment = {turn}\n")
    return root


def test_seven_scenes(seven_scenes: Path) -> None:
    data = RGBDFolderConfig(root=seven_scenes, views=2, step=2, stride=1, points=50).build()
    assert len(data) == 2
    sample = data[1]
    assert sample.image.shape == (2, 3, 12, 16)
    assert sample.image[:, 0, 0, 0].tolist() == pytest.approx([60 / 255, 140 / 255])  # frames 1 and 3
    assert sample.intrinsics[0].tolist() == [[20.0, 0.0, 8.0], [0.0, 20.0, 6.0], [0.0, 0.0, 1.0]]
    assert torch.allclose(sample.cameras.centers, torch.tensor([EYES[1], EYES[3]]), atol=1e-6)
    assert sample.depth is not None
    assert sample.depth[0, 0, :3].tolist() == [0.0, 0.0, 2.0]
    assert torch.equal(sample.valid, sample.depth > 0)  # type: ignore[arg-type]
    assert sample.points is not None
    assert torch.allclose(sample.points[:, 1], torch.zeros(50), atol=1e-5)  # the wall
    assert torch.equal(data[1].points, sample.points)  # type: ignore[arg-type]
    small = RGBDFolderConfig(root=seven_scenes, views=1, width=8, height=12, points=0).build()[0]
    assert small.image.shape == (1, 3, 12, 8)
    assert small.intrinsics[0, 0].tolist() == [10.0, 0.0, 4.0]
    assert small.points is None


def test_scannet(scannet: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = RGBDFolderConfig(root=scannet, views=2, step=1, points=30).build()
    assert data.frames[:4] == ["0", "1", "3", "4"]  # numbered, not by letters: 10 comes last
    assert data.frames[-1] == "10"
    assert data.skipped == ["2"]
    assert "left out 1 of 11 frames" in caplog.text
    sample = data[0]
    assert sample.image.shape == (2, 3, 12, 16)  # brought to the size of depth
    expected = torch.tensor([[5 + 2.0, 0.0, 1.5]])  # turned and shifted by the axis alignment
    assert torch.allclose(sample.cameras.centers[:1], expected, atol=1e-5)
    assert torch.allclose(sample.points[:, 0], torch.full((30,), 5.0), atol=1e-4)  # type: ignore[index]


@pytest.fixture
def votenet(tmp_path: Path) -> Path:
    root = tmp_path / "sunrgbd"
    (root / "calib").mkdir(parents=True)
    (root / "image").mkdir()
    rng = np.random.default_rng(0)
    np.savez(root / "000001_pc.npz", pc=np.concatenate([rng.uniform(1, 2, (100, 3)), rng.uniform(0, 1, (100, 3))], 1))
    np.save(root / "000001_bbox.npy", np.array([[0.5, 2.0, 0.4, 1.0, 0.5, 0.25, 0.3, 3]]))
    tilt = np.array([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]])
    k = np.array([[500.0, 0, 320.5], [0, 500, 240.5], [0, 0, 1]])
    (root / "calib" / "000001.txt").write_text(" ".join(map(str, tilt.T.ravel())) + "\n" + " ".join(map(str, k.T.ravel())) + "\n")
    Image.new("RGB", (64, 48), (255, 0, 0)).save(root / "image" / "000001.jpg")
    return root


def test_sunrgbd(votenet: Path) -> None:
    data = SUNRGBDConfig(root=votenet, points=150).build()
    sample = data[0]
    assert data.classes[3] == "chair"
    assert sample.boxes is not None
    assert torch.allclose(sample.boxes, torch.tensor([[0.5, 2.0, 0.4, 2.0, 1.0, 0.5, -0.3]]))  # full sizes, counter-clockwise
    assert sample.labels.tolist() == [3]  # type: ignore[union-attr]
    assert sample.points.shape == (150, 3)  # type: ignore[union-attr]
    assert sample.image.shape == (1, 3, 48, 64)
    assert sample.intrinsics[0, 0].tolist() == [500.0, 0.0, 320.0]
    # p_cam = F Rtilt^T p with F (x, y, z) -> (x, -z, y)
    point = np.array([0.2, 2.0, -0.1])
    x, y, z = np.array([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]]).T @ point
    pixel, depth = project(torch.tensor(point)[None].float(), sample.world_to_cam[0], sample.intrinsics[0])
    assert float(depth) == pytest.approx(y, abs=1e-5)
    assert pixel[0].tolist() == pytest.approx([500 * x / y + 320, 500 * -z / y + 240], abs=1e-2)


@pytest.fixture
def posed(tmp_path: Path) -> Path:
    root = tmp_path / "nerf"
    (root / "images").mkdir(parents=True)
    frames = []
    for number in range(5):
        if number < 4:
            Image.new("RGB", (20, 10), (50 * number, 0, 0)).save(root / "images" / f"{number}.png")
        opengl = pose(number) @ np.diag([1.0, -1.0, -1.0, 1.0])
        frames.append({"file_path": f"images/{number}", "transform_matrix": opengl.tolist()})
    table = {"camera_angle_x": 2 * np.arctan(0.5), "w": 40, "h": 20, "frames": frames}
    (root / "transforms.json").write_text(json.dumps(table))
    return root


def test_transforms(posed: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = TransformsConfig(root=posed, views=2).build()
    assert len(data) == 2
    assert data.skipped == ["images/4"]
    assert "left out 1 of 5 frames, whose image is missing" in caplog.text
    sample = data[1]
    assert sample.image.shape == (2, 3, 10, 20)
    assert sample.image[:, 0, 0, 0].tolist() == pytest.approx([50 / 255, 150 / 255])
    assert torch.allclose(sample.cameras.centers, torch.tensor([EYES[1], EYES[3]]), atol=1e-6)
    assert torch.allclose(sample.world_to_cam[0, 2, :3], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)  # forward is north
    assert sample.intrinsics[0].tolist() == [[pytest.approx(20.0), 0.0, 10.0], [0.0, pytest.approx(20.0), 5.0], [0.0, 0.0, 1.0]]
    every = TransformsConfig(root=posed / "transforms.json", all_views=True, width=10, height=8).build()
    assert len(every) == 1
    assert every[0].image.shape == (4, 3, 8, 10)


def corrupt(path: Path, content: str) -> Callable[[Path], None]:
    return lambda root: (root / path).write_text(content) and None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "frame-000001.depth.png").unlink(), r"frame-000001\.depth\.png: this depth image does not exist"),
        (corrupt(Path("frame-000000.color.png"), "no"), r"frame-000000\.color\.png: cannot be read as an image"),
        (corrupt(Path("frame-000000.pose.txt"), "1 2 3\n"), r"frame-000000\.pose\.txt: expected at least 4 x 4 numbers"),
        (corrupt(Path("frame-000000.pose.txt"), "2 0 0 0\n0 2 0 0\n0 0 2 0\n0 0 0 1\n"), "is not a rotation and a translation"),
        (corrupt(Path("../camera-intrinsics.txt"), "0 0 8\n0 20 6\n0 0 1\n"), "intrinsics must be finite with positive focal lengths"),
        (corrupt(Path("frame-000000.pose.txt"), "a b c d\n" * 4), "is not a matrix of numbers"),
        (
            lambda root: Image.new("RGB", (4, 4)).save(root / "frame-000000.depth.png"),
            r"a depth image has one channel of 16 bits, this one is RGB",
        ),
    ],
)
def test_damaged_frames_are_named(seven_scenes: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(seven_scenes)
    with pytest.raises(DataError, match=message):
        RGBDFolderConfig(root=seven_scenes, views=2, step=1, points=8).build()[0]


def test_wrong_folders_and_settings(seven_scenes: Path, votenet: Path, posed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: this folder does not exist"):
        RGBDFolderConfig(root=tmp_path / "nowhere").build()
    with pytest.raises(DataError, match=r"holds neither frame-\*\.pose\.txt"):
        RGBDFolderConfig(root=posed).build()
    with pytest.raises(DataError, match=r"has 4 frames with a pose, a sample needs 61 \(views=4, step=20\)"):
        RGBDFolderConfig(root=seven_scenes).build()
    with pytest.raises(DataError, match="the split must be 'all', got 'train'"):
        RGBDFolderConfig(root=seven_scenes).build("train")
    with pytest.raises(DataError, match=r"holds no \*_pc\.npz"):
        SUNRGBDConfig(root=posed).build()
    with pytest.raises(ConfigError, match="views must be 1"):
        SUNRGBDConfig(views=2)
    np.save(votenet / "000001_bbox.npy", np.zeros((2, 7)))
    with pytest.raises(DataError, match=r"boxes must be \[n, 8\]"):
        SUNRGBDConfig(root=votenet).build()[0]
    np.save(votenet / "000001_bbox.npy", np.full((1, 8), 12.0))
    with pytest.raises(DataError, match=r"classes must lie in 0\.\.9"):
        SUNRGBDConfig(root=votenet).build()[0]
    (votenet / "calib" / "000001.txt").write_text("1 2 3\n")
    np.save(votenet / "000001_bbox.npy", np.zeros((0, 8)))
    with pytest.raises(DataError, match="two lines of nine numbers"):
        SUNRGBDConfig(root=votenet).build()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": None}, "has no list 'frames'"),
        ({"frames": [{"file_path": "images/0"}]}, r"frame 0 needs a file_path and a 4 x 4 transform_matrix"),
        ({"frames": []}, "lists 0 images that exist, a sample needs 1"),
        ({"frames": [{"file_path": "images/0", "transform_matrix": [[1, 2], [3]]}]}, "frame 0 needs a file_path and a 4 x 4"),
        ({"fl_x": "wide"}, "must be numbers"),
        ({"fl_x": 20, "cx": [1]}, "must be numbers"),
        ({"w": 0}, "w and h must be at least 1"),
        ({"camera_angle_x": 0}, "camera_angle_x must lie between 0 and pi"),
        ({"fl_x": -5}, "intrinsics must be finite with positive focal lengths"),
        ({"camera_angle_x": ...}, "neither fl_x nor camera_angle_x"),
    ],
)
def test_wrong_transforms(posed: Path, change: dict, message: str) -> None:
    table = json.loads((posed / "transforms.json").read_text())
    for key, value in change.items():
        table[key] = value
    (posed / "transforms.json").write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
    with pytest.raises(DataError, match=message):
        TransformsConfig(root=posed, views=1).build()[0]


@pytest.fixture
def real() -> Path:
    root = os.environ.get("GEOSSL_REAL_DATA")
    if not root:
        pytest.skip("GEOSSL_REAL_DATA is not set: real posed images are needed")
    return Path(root)


def test_real_rgbd_frames_agree(real: Path) -> None:
    """The clouds of two real frames, each put into the world by its own pose, lie on each other."""
    data = RGBDFolderConfig(root=real / "rgbd" / "seven_scenes_frames", views=1, step=1, points=4000).build()
    assert len(data) == 8
    a, b = data[0].points, data[1].points
    assert a is not None
    assert b is not None
    nearest = torch.cdist(a, b).amin(1)
    assert float(nearest.median()) < 0.03
    turned = b + torch.tensor([0.3, 0.0, 0.0])
    assert float(torch.cdist(a, turned).amin(1).median()) > 1.5 * float(nearest.median())


def test_real_sunrgbd_colours_match(real: Path, tmp_path: Path) -> None:
    """A real scene, its projection split into K and Rtilt and written in VoteNet's layout, gets the colours of its image back."""
    from scipy.linalg import rq

    folder = real / "rgbd" / "sunrgbd_000017"
    info = json.loads((folder / "infos.json").read_text())
    matrix = np.array(_find(info, "depth2img")).reshape(-1, np.shape(_find(info, "depth2img"))[-1])[:3, :3]
    k, rotation = rq(matrix)
    signs = np.sign(np.diag(k))
    k, rotation = k * signs, signs[:, None] * rotation
    axes = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    tilt = (axes.T @ rotation).T
    for name in ("calib", "image"):
        (tmp_path / name).mkdir()
    k = k / k[2, 2]
    (tmp_path / "calib" / "000017.txt").write_text("\n".join(" ".join(map(repr, m.T.ravel().tolist())) for m in (tilt, k)) + "\n")
    (tmp_path / "image" / "000017.jpg").write_bytes((folder / "image.jpg").read_bytes())
    np.savez(tmp_path / "000017_pc.npz", pc=np.fromfile(folder / "points.bin", dtype=np.float32).reshape(-1, 6))
    np.save(tmp_path / "000017_bbox.npy", np.zeros((0, 8)))
    sample = SUNRGBDConfig(root=tmp_path, points=5000).build()[0]
    assert sample.points is not None
    assert sample.colors is not None
    pixels, depth = project(sample.points, sample.world_to_cam[0], sample.intrinsics[0])
    assert 1.0 < float(depth.min()) < float(depth.max()) < 9.0
    column, row = pixels.floor().long().unbind(1)
    inside = (column >= 0) & (row >= 0) & (column < 730) & (row < 530)
    assert float(inside.float().mean()) > 0.99
    seen = sample.image[0][:, row[inside], column[inside]].T
    assert float((seen - sample.colors[inside]).abs().mean()) < 0.01


def _find(value: object, key: str) -> object:
    """Return the first value called ``key`` in nested lists and mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        if name == key:
            return inner
        found = _find(inner, key)
        if found is not None:
            return found
    return None


def test_real_transforms_face_their_subject(real: Path) -> None:
    sample = TransformsConfig(root=real / "nerf" / "fox", all_views=True).build()[0]
    assert sample.image.shape == (50, 3, 320, 180)
    centers, forward = sample.cameras.centers.double(), sample.world_to_cam[:, 2, :3].double()
    across = torch.eye(3).double() - forward[:, :, None] * forward[:, None]
    middle = torch.linalg.solve(across.sum(0), (across @ centers[:, :, None]).sum(0))[:, 0]  # where the axes meet
    assert float((((middle - centers) * forward).sum(1) > 0).double().mean()) > 0.8
