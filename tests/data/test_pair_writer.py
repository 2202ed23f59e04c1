"""``prepare_data.py pairs`` on files written here in the layouts it reads, and the tars it writes read back."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from geossl.cli import run
from geossl.data import (
    MiningOptions,
    PairsConfig,
    PairShardOptions,
    PairShardsConfig,
    RoomShardOptions,
    build_loader,
    check_pairs,
    write_pairs,
    write_rooms,
)
from geossl.data.colmap import read_colmap
from geossl.data.image_files import decode_image
from geossl.data.pair_mining import mine_pairs
from geossl.data.pair_sources import find_places
from geossl.errors import ConfigError, DataError
from geossl.geometry import invert_pose, look_at

WIDTH, HEIGHT, FOCAL = 64, 48, 40.0
CAMERAS = ((0.0, 0.0), (0.6, -10.0), (1.2, -20.0), (9.0, 0.0), (9.5, -15.0))  # x and yaw in degrees, 2 m before a wall
ALL = MiningOptions(redundant=None, min_score=0.01, max_iou=0.97)
OPTIONS = PairShardOptions(mining=ALL, size=32, image="png")


def pose(x: float, yaw: float, distance: float = 2.0) -> torch.Tensor:
    eye = torch.tensor([x, -distance, 1.0], dtype=torch.float64)
    return look_at(eye, eye + torch.tensor([math.sin(math.radians(yaw)), math.cos(math.radians(yaw)), 0.0], dtype=torch.float64))


def photograph(world_to_cam: torch.Tensor) -> tuple[Image.Image, np.ndarray]:
    """A wall y = 0 that carries its own coordinates as colours, and its depth in millimetres."""
    rows, columns = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    rays = np.stack([(columns - WIDTH / 2) / FOCAL, (rows - HEIGHT / 2) / FOCAL, np.ones_like(rows)], -1)
    cam_to_world = invert_pose(world_to_cam).numpy()
    rays = rays @ cam_to_world[:3, :3].T
    depth = -cam_to_world[1, 3] / rays[..., 1]
    place = cam_to_world[:3, 3] + depth[..., None] * rays
    color = np.stack([np.mod(60 * place[..., 0], 256), np.mod(60 * place[..., 2], 256), 128 + 100 * np.sin(9 * place[..., 0])], -1)
    return Image.fromarray(color.astype(np.uint8)), (1000 * depth).round().astype(np.uint16)


def write_frames(root: Path, cameras: tuple[tuple[float, float], ...] = CAMERAS) -> Path:
    """7-Scenes' layout."""
    root.mkdir(parents=True)
    np.savetxt(root / "camera-intrinsics.txt", [[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    for number, camera in enumerate(cameras):
        image, depth = photograph(pose(*camera))
        image.save(root / f"frame-{number:06d}.color.png")
        Image.fromarray(depth).save(root / f"frame-{number:06d}.depth.png")
        np.savetxt(root / f"frame-{number:06d}.pose.txt", invert_pose(pose(*camera)).numpy())
    return root


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def names(out: Path) -> list[list[str]]:
    """The images of every pair written, by the last part of their names."""
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found.append([Path(name).name for name in json.loads(tar.extractfile(member).read())["images"]])  # type: ignore[union-attr]
    return found


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    write_frames(tmp_path / "scenes" / "chess" / "seq-01")
    write_frames(tmp_path / "scenes" / "fire" / "seq-02", CAMERAS[:2])
    return tmp_path / "scenes"


def test_mining_a_folder_of_scenes(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = write_pairs(scenes, out, OPTIONS)
    assert [shard["name"] for shard in index["shards"]] == ["chess/seq-01", "fire/seq-02"]
    frames = [[int(name[6:12]) for name in pair] for pair in names(out)]
    assert sorted(frames[: index["shards"][0]["pairs"]]) == [[0, 1], [0, 2], [1, 2], [3, 4]]  # never one end of the wall with the other
    assert frames[index["shards"][0]["pairs"] :] == [[0, 1]]
    assert check_pairs(out) == 2
    data = PairShardsConfig(root=out, crop=32, resize=None).build("all")
    assert len(data) == index["pairs"] == 5
    for row in range(len(data)):  # corresponding windows show mostly the same part of the wall: its colours are its coordinates
        first, second = (image.flatten(1).float() for image in data.read(row))
        near = (first[:2, :, None] - second[:2, None, ::7]).abs().amax(0) < 8
        assert near.any(0).float().mean() > 0.5


def test_the_files_do_not_depend_on_workers_and_interruptions(scenes: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    steps: list[tuple[float, int]] = []
    write_pairs(scenes, one, OPTIONS, lambda done, total: steps.append((done, total)))
    assert steps[-1] == (2, 2)
    assert any(done % 1 for done, _ in steps)  # a place tells how far it is
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    write_pairs(scenes, two, PairShardOptions(**{**vars(OPTIONS), "workers": 2}))
    assert contents(one) == contents(two)
    before = (one / "pairs-00000.tar").stat().st_mtime_ns
    (one / "pairs-00001.json").unlink()
    (one / ".pairs-00001.tar.12.tmp").write_bytes(b"half")
    index = json.loads((one / "index.json").read_text())
    (one / "index.json").write_text(json.dumps({**index, "complete": False}))
    with pytest.raises(DataError, match="writing the pairs was interrupted; run the same"):
        PairShardsConfig(root=one).build()
    write_pairs(scenes, one, OPTIONS)
    assert contents(one) == contents(two)
    assert (one / "pairs-00000.tar").stat().st_mtime_ns == before  # not made again
    with pytest.raises(DataError, match=r"holds pairs made with other settings \(size: 32 -> 40\)"):
        write_pairs(scenes, one, PairShardOptions(**{**vars(OPTIONS), "size": 40}))
    with pytest.raises(DataError, match="is not empty and holds no set of pairs"):
        write_pairs(scenes, scenes, OPTIONS)
    (two / "pairs-00000.tar").write_bytes(b"x" * (two / "pairs-00000.tar").stat().st_size)
    with pytest.raises(DataError, match="its checksum is not that of the index"):
        check_pairs(two)


def test_a_source_that_changed_is_not_taken_for_the_old_one(scenes: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", scenes / "mine.txt"
    write_pairs(scenes, out, OPTIONS)
    write_frames(scenes / "desk" / "seq-01", CAMERAS[:2])  # the second place now: those behind it get other numbers
    index = write_pairs(scenes, out, OPTIONS)
    assert [shard["name"] for shard in index["shards"]] == ["chess/seq-01", "desk/seq-01", "fire/seq-02"]
    write_pairs(scenes, tmp_path / "anew", OPTIONS)
    assert contents(out) == contents(tmp_path / "anew")
    for other in (1, 2):
        listed.write_text(f"chess/seq-01/frame-000000.color.png chess/seq-01/frame-{other:06d}.color.png\n")
        write_pairs(listed, tmp_path / "list", PairShardOptions(size=24))
        assert names(tmp_path / "list") == [["frame-000000.color.png", f"frame-{other:06d}.color.png"]]


def test_what_cannot_be_used_is_counted(scenes: Path, tmp_path: Path) -> None:
    root = scenes / "chess" / "seq-01"
    np.savetxt(root / "frame-000003.pose.txt", np.full((4, 4), -np.inf))
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(root / "frame-000004.depth.png")
    (root / "frame-000001.color.png").write_bytes(b"junk")
    (scenes / "fire" / "seq-02" / "frame-000000.depth.png").unlink()
    index = write_pairs(scenes, tmp_path / "out", OPTIONS)
    assert sorted(names(tmp_path / "out")) == [["frame-000000.color.png", "frame-000002.color.png"]]
    counts = index["left_out"]
    assert counts["frames: pose not known"] == 1
    assert counts["frames: depth in too few pixels"] == 1
    assert counts["frames: image or depth missing or damaged"] == 1
    assert counts["pairs: image damaged"] == 2
    assert "frame-000001.color.png: cannot be read as an image" in index["examples"]["pairs: image damaged"]
    assert PairShardsConfig(root=tmp_path / "out", crop=32, resize=None).build().check() == []


def test_unusable_places_are_counted_and_nothing_at_all_is_an_error(scenes: Path, tmp_path: Path) -> None:
    (scenes / "fire" / "seq-02" / "camera-intrinsics.txt").write_text("not numbers")
    index = write_pairs(scenes, tmp_path / "out", OPTIONS)
    assert index["left_out"]["places: cannot be used"] == 1
    assert "is not a matrix" in index["examples"]["places: cannot be used"]
    with pytest.raises(DataError, match=r"no pair was made \(1 places: cannot be used\).*is not a matrix"):
        write_pairs(scenes / "fire", tmp_path / "other", OPTIONS)
    apart = write_frames(tmp_path / "apart", ((0.0, 0.0), (50.0, 0.0)))
    with pytest.raises(DataError, match="no pair was made"):
        write_pairs(apart, tmp_path / "nothing", OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither posed images"):
        write_pairs(tmp_path / "empty", tmp_path / "nothing", OPTIONS)
    with pytest.raises(DataError, match="does not exist"):
        write_pairs(tmp_path / "no", tmp_path / "nothing", OPTIONS)


def test_mined_crops_can_be_cut_anew_from_their_list(scenes: Path, tmp_path: Path) -> None:
    write_pairs(scenes, tmp_path / "mined", OPTIONS)
    index = write_pairs(tmp_path / "mined" / "crops.txt", tmp_path / "cut", OPTIONS)
    assert index["left_out"] == {}
    mined, again = (PairShardsConfig(root=tmp_path / name, crop=32, resize=None).build("all") for name in ("mined", "cut"))
    assert len(mined) == len(again)
    for row in range(len(mined)):
        assert all(torch.equal(a, b) for a, b in zip(mined.read(row), again.read(row), strict=True))


def test_crop_lists_skip_and_count(scenes: Path, tmp_path: Path) -> None:
    frames = "chess/seq-01/frame-000000.color.png, chess/seq-01/frame-000001.color.png"
    path = tmp_path / "crops_release.txt"
    path.write_text(
        f"# c\n{frames}, 90\n0, 32, 0, 32, 8, 40, 4, 36\n0, 99, 0, 32, 8, 40, 4, 36\nno.png, no.png, 0\n0, 8, 0, 8, 0, 8, 0, 8\n"
    )
    index = write_pairs(path, tmp_path / "out", PairShardOptions(size=32, image="png", images=scenes, pairs_per_shard=1))
    assert (index["pairs"], len(index["shards"])) == (1, 2)
    assert index["left_out"] == {"windows: beyond the image": 1, "pairs: image missing": 1}
    first, second = PairShardsConfig(root=tmp_path / "out", crop=32, resize=None).build("all").read(0)
    sources = [decode_image(scenes / name.strip(), name) for name in frames.split(",")]
    assert torch.equal(first, sources[0][:, :32, :32])
    assert torch.equal(second, torch.rot90(sources[1][:, 4:36, 8:40], 1, (1, 2)))


def test_lists_of_pairs_are_packed_whole(scenes: Path, tmp_path: Path) -> None:
    path = scenes / "mine.txt"
    path.write_text(
        "".join(f"chess/seq-01/frame-{a:06d}.color.png chess/seq-01/frame-{b:06d}.color.png\n" for a, b in ((0, 1), (3, 4), (1, 2)))
    )
    index = write_pairs(path, tmp_path / "out", PairShardOptions(size=24, image="png", pairs_per_shard=2))
    assert [shard["pairs"] for shard in index["shards"]] == [2, 1]
    data = PairShardsConfig(root=tmp_path / "out", crop=24, resize=None).build("all")
    assert data.read(0)[0].shape == (3, 24, 32)


def test_folders_are_read_as_pairs(scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = write_pairs(scenes, out, PairShardOptions(**{**vars(OPTIONS), "layout": "folder"}))
    data = PairsConfig(root=out, crop=32, resize=None).build("all")
    assert len(data) == index["pairs"]
    tars = tmp_path / "tars"
    write_pairs(scenes, tars, OPTIONS)
    packed = PairShardsConfig(root=tars, crop=32, resize=None).build("all")
    for row in range(len(data)):
        assert all(torch.equal(a, b) for a, b in zip(data.read(row), packed.read(row), strict=True))
    with pytest.raises(DataError, match=r"holds folders of images, not tars; read it with data\.name pairs"):
        PairShardsConfig(root=out).build()
    assert data.check() == []
    with pytest.raises(DataError, match="folders of images, which have no checksums"):
        check_pairs(out)


# ---------------------------------------------------------------------------------------------------------------------
# Other sources


def test_rooms(tmp_path: Path, surfel_cache: Path) -> None:
    common = {"count": 1, "points": 0, "width": 48, "height": 48, "kind": "bathroom"}
    write_rooms(tmp_path / "views", RoomShardOptions(**common, views=4))  # type: ignore[arg-type]
    write_rooms(tmp_path / "pairs", RoomShardOptions(**common, views=1, pairs=2))  # type: ignore[arg-type]
    mined = write_pairs(tmp_path / "views", tmp_path / "a", PairShardOptions(mining=MiningOptions(min_score=0.0), size=32))
    assert mined["pairs"] >= 1
    taken = write_pairs(tmp_path / "pairs", tmp_path / "b", PairShardOptions(size=48, image="png"))
    assert taken["pairs"] == 2
    with tarfile.open(tmp_path / "pairs" / "rooms-00000.tar") as tar:
        stored = decode_image(tar.extractfile("room_00000000.pair_001_2.png").read(), "x")  # type: ignore[union-attr]
    assert torch.equal(PairShardsConfig(root=tmp_path / "b", crop=48, resize=None).build("all").read(1)[1], stored)
    assert run("prepare-data", ["check", "--source", str(tmp_path / "b")]) == 0


def write_transforms(root: Path, depth: bool, cameras: list[torch.Tensor]) -> Path:
    root.mkdir()
    frames = []
    for number, world_to_cam in enumerate(cameras):
        image, millimetres = photograph(world_to_cam)
        image.save(root / f"{number}.png")
        matrix = invert_pose(world_to_cam).numpy()
        matrix[:3, 1:3] *= -1
        frames.append({"file_path": f"{number}.png", "transform_matrix": matrix.tolist()})
        if depth:
            Image.fromarray(millimetres).save(root / f"{number}_depth.png")
            frames[-1]["depth_file_path"] = f"{number}_depth.png"
    table = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT, "frames": frames}
    (root / "transforms.json").write_text(json.dumps(table))
    return root


def test_transforms_with_depth_equal_frames_with_depth(tmp_path: Path) -> None:
    (place,) = find_places(write_transforms(tmp_path / "nerf", True, [pose(*camera) for camera in CAMERAS]))
    (other,) = find_places(write_frames(tmp_path / "frames"))
    mined, expected = (mine_pairs(found.open(ALL).geometry, ALL) for found in (place, other))  # type: ignore[arg-type]
    assert np.array_equal(mined.pairs, expected.pairs)
    assert np.allclose(mined.iou, expected.iou, atol=1e-3)
    assert place.open(ALL).known == "depth"


def test_transforms_without_depth_look_at_a_common_focus(tmp_path: Path) -> None:
    target = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    angles = [-70, -25, 0, 25]
    eyes = [torch.tensor([2 * math.sin(math.radians(a)), -2 * math.cos(math.radians(a)), 1.0], dtype=torch.float64) for a in angles]
    root = write_transforms(tmp_path / "nerf", False, [look_at(eye, target) for eye in eyes])
    (place,) = find_places(root)
    posed = place.open(ALL)
    assert posed.known == "focus"
    assert posed.geometry.depth[:, 0, 0].tolist() == pytest.approx([2.0] * 4, abs=1e-4)  # type: ignore[union-attr]
    options = PairShardOptions(mining=MiningOptions(max_iou=1.0, redundant=None, min_score=0.05, max_angle=60), size=24)
    index = write_pairs(root, tmp_path / "out", options)
    assert index["shards"][0]["known"] == "focus"
    assert sorted(names(tmp_path / "out")) == [["0.png", "1.png"], ["1.png", "2.png"], ["1.png", "3.png"], ["2.png", "3.png"]]
    (out_away,) = find_places(write_transforms(tmp_path / "panorama", False, [pose(0.1 * n, 90.0 * n) for n in range(4)]))
    with pytest.raises(DataError, match=r"has no depth images, and .* cameras look away"):
        out_away.open(ALL)


def write_colmap(root: Path, binary: bool) -> Path:
    """A model of points on the wall, seen where they project to."""
    (root / "images").mkdir(parents=True)
    model = root / "sparse" / "0"
    model.mkdir(parents=True)
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(-3, 12, 3000), np.zeros(3000), rng.uniform(-2, 4, 3000)], 1)
    rows = []
    for number, camera in enumerate(CAMERAS):
        world_to_cam = pose(*camera).numpy()
        photograph(pose(*camera))[0].save(root / "images" / f"{number}.png")
        x, y, z = world_to_cam[:3, :3] @ points.T + world_to_cam[:3, 3:]
        u, v = FOCAL * x / z + WIDTH / 2, FOCAL * y / z + HEIGHT / 2
        seen = np.flatnonzero((z > 0) & (u > 0) & (u < WIDTH) & (v > 0) & (v < HEIGHT))
        from scipy.spatial.transform import Rotation

        quaternion = Rotation.from_matrix(world_to_cam[:3, :3]).as_quat()[[3, 0, 1, 2]]
        spots = [(u[k], v[k], int(k)) for k in seen] + [(1.0, 1.0, -1)]
        rows.append((number + 1, [*quaternion, *world_to_cam[:3, 3]], f"{number}.png", spots))
    if binary:
        (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 7, 1, WIDTH, HEIGHT, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2))
        data = struct.pack("<Q", len(rows))
        for number, values, name, spots in rows:
            data += struct.pack("<I7dI", number, *values, 7) + name.encode() + b"\0" + struct.pack("<Q", len(spots))
            data += b"".join(struct.pack("<ddq", *spot) for spot in spots)
        (model / "images.bin").write_bytes(data)
        return root
    (model / "cameras.txt").write_text(f"# list\n7 PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n")
    lines = ["# images"]
    for number, values, name, spots in rows:
        lines += [" ".join(map(repr, [number, *map(float, values), 7])) + f" {name}", " ".join(f"{u!r} {v!r} {k}" for u, v, k in spots)]
    (model / "images.txt").write_text("\n".join(line.replace("np.float64(", "").replace(")", "") for line in lines) + "\n")
    return root


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_models(tmp_path: Path, binary: bool) -> None:
    root = write_colmap(tmp_path / "colmap", binary)
    images = read_colmap(root).images
    assert [image.name for image in images] == [f"{number}.png" for number in range(5)]
    assert np.allclose(images[1].world_to_cam, pose(*CAMERAS[1]).numpy(), atol=1e-9)
    assert images[0].places.min() >= 0
    assert images[0].places.max() <= 1
    (place,) = find_places(root)
    (frames,) = find_places(write_frames(tmp_path / "frames"))
    mined, expected = (mine_pairs(found.open(ALL).geometry, ALL) for found in (place, frames))  # type: ignore[arg-type]
    assert sorted(mined.pairs.tolist()) == sorted(expected.pairs.tolist())
    for (one, other), iou in zip(mined.pairs.tolist(), mined.iou.tolist(), strict=True):
        a, b = (set(images[number].points.tolist()) for number in (one, other))
        assert iou == pytest.approx(len(a & b) / len(a | b), abs=1e-5)
    index = write_pairs(root, tmp_path / "out", OPTIONS)
    assert index["pairs"] == 4
    model = root / "sparse" / "0" / ("images.bin" if binary else "images.txt")
    model.write_bytes(model.read_bytes()[: -100 if binary else 300])
    with pytest.raises(DataError, match=r"images\.(bin|txt): cannot be read as a COLMAP model"):
        read_colmap(root)


# ---------------------------------------------------------------------------------------------------------------------
# Reading tars


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of four pairs; the blue of every image is its number."""
    folder, lines = tmp_path / "images", []
    folder.mkdir()
    for number in range(8):
        for side in (1, 2):
            Image.fromarray(np.full((20, 24, 3), 10 * number + side, np.uint8)).save(folder / f"{number}_{side}.png")
        lines.append(f"{number}_1.png {number}_2.png\n")
    (folder / "pairs.txt").write_text("".join(lines))
    write_pairs(folder, tmp_path / "tars", PairShardOptions(size=20, image="png", pairs_per_shard=4))
    return tmp_path / "tars"


def test_batches_do_not_depend_on_workers_and_continue(tars: Path) -> None:
    data = PairShardsConfig(root=tars, crop=16, resize=None).build("all")
    assert [int(data.read(row)[1][0, 0, 0]) for row in range(8)] == [10 * row + 2 for row in range(8)]
    plain = build_loader(data, 3, seed=1)
    batches = [next(plain) for _ in range(4)]
    other = build_loader(pickle.loads(pickle.dumps(data)), 3, seed=1, workers=2)
    other.load_state_dict({**plain.state_dict(), "step": 2})
    for expected in batches[2:]:
        got = next(other)
        assert torch.equal(got.image, expected.image)
        assert torch.equal(got.reference, expected.reference)


def test_parts_do_not_tear_shards(tars: Path) -> None:
    for fraction, sizes in ((0.0, (8, 0)), (0.4, (8, 0)), (0.5, (4, 4)), (0.9, (4, 4))):
        config = PairShardsConfig(root=tars, test_fraction=fraction)
        assert (len(config.build("train")), len(config.build("test"))) == sizes
    assert PairShardsConfig(root=tars, resize=None, test_fraction=0.5).build("test").read(0)[0][0, 0, 0] == 41


def test_webdataset_reads_them_too(tars: Path) -> None:
    samples = list(webdataset.WebDataset(str(tars / "pairs-00000.tar"), shardshuffle=False))
    assert len(samples) == 4
    assert {"1.png", "2.png", "json"} <= set(samples[0])
    assert json.loads(samples[0]["json"])["images"] == ["0_1.png", "0_2.png"]


def test_tars_of_others_are_searched(tars: Path, tmp_path: Path) -> None:
    indexed = PairShardsConfig(root=tars, crop=16, resize=None).build("all")
    other = tmp_path / "other"
    other.mkdir()
    for path in tars.glob("*.tar"):
        (other / path.name).write_bytes(path.read_bytes())
    searched = PairShardsConfig(root=other, crop=16, resize=None).build("all")
    assert np.array_equal(searched._places, indexed._places)
    with tarfile.open(other / "z.tar", "w") as tar:
        info = tarfile.TarInfo("x.1.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert PairShardsConfig(root=other).build("all").lost == 1


@pytest.mark.parametrize("index", [True, False])
def test_cut_off_tars_lose_pairs_that_are_counted(tars: Path, index: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = tars / "pairs-00001.tar"
    if not index:
        for file in (*tars.glob("*.npy"), tars / "index.json"):
            file.unlink()
    path.write_bytes(path.read_bytes()[:4000])
    with caplog.at_level(logging.WARNING, "geossl"):
        data = PairShardsConfig(root=tars, crop=16, resize=None).build("all")
    assert 4 < len(data) < 8
    assert data.check() == []
    assert data.lost >= 1
    if index:
        assert data.lost == 8 - len(data)
    assert f"{data.lost} pairs are lost; the first in {path}: it " in caplog.text
    with pytest.raises(DataError, match=r"pairs are lost; the first in .*pairs-00001\.tar"):
        PairShardsConfig(root=tars, damaged="error").build("all")


def test_damaged_images_in_tars_are_skipped_and_counted(tars: Path) -> None:
    places = np.load(tars / "pairs-00000.npy")
    data = bytearray((tars / "pairs-00000.tar").read_bytes())
    offset = int(places[1, 0, 0])
    data[offset : offset + 30] = bytes(30)
    (tars / "pairs-00000.tar").write_bytes(data)
    dataset = PairShardsConfig(root=tars, crop=16, resize=None).build("all")
    assert dataset.get(1).index == 2
    assert list(dataset.unusable) == [1]
    assert f"pairs-00000.tar pair at byte {offset}" in dataset.unusable[1]
    (tars / "pairs-00000.npy").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"pairs-00000\.npy: cannot be read; it is damaged .* the tar is searched instead"):
        PairShardsConfig(root=tars).build("all")
    with pytest.raises(DataError, match=r"holds no \*\.tar"):
        PairShardsConfig(root=tars.parent / "images").build("all")


def test_command_line(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scenes / "fire" / "seq-02" / "frame-000001.depth.png").unlink()
    arguments = ["--source", str(scenes), "--out", str(tmp_path / "out"), "--size", "32", "--mining.redundant", "None"]
    assert run("prepare-data", ["pairs", *arguments]) == 0
    told = capsys.readouterr().out
    assert "pairs in 1 shards" in told
    assert "left out 1 frames: image or depth missing or damaged; the first: fire/seq-02" in told
    assert f"--data.name pair_shards --data.root {tmp_path / 'out'}" in told
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    assert run("prepare-data", ["check", "--source", str(tmp_path / "out")]) == 0
    assert run("prepare-data", ["pairs"]) == 2
    assert "--source is needed" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"size": 8}, {"crops": -1}, {"min_crop_overlap": 0.0}, {"quality": 0}, {"workers": 0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PairShardOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.skipif("GEOSSL_REAL_DATA" not in os.environ, reason="GEOSSL_REAL_DATA is not set")
def test_real_frames(tmp_path: Path) -> None:
    root = Path(os.environ["GEOSSL_REAL_DATA"]) / "rgbd" / "seven_scenes_frames"
    index = write_pairs(root, tmp_path / "out", PairShardOptions(mining=MiningOptions(redundant=None)))
    assert index["pairs"] >= 4
    assert PairShardsConfig(root=tmp_path / "out").build().check() == []
