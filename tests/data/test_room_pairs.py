"""Pairs rendered from simulated rooms: truth that is right, parts that share no room, pictures that are kept."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample

from geossl.data import ColorJitterConfig, RoomPairsConfig, build_loader, normals_from_depth
from geossl.data import room_pairs as module
from geossl.errors import ConfigError, DataError
from geossl.geometry import denormalize_images, intrinsics_from_fov, pixel_centers

pytestmark = pytest.mark.usefixtures("surfel_cache")

TINY = {"size": 48, "crop": 48, "rooms": 1, "test_rooms": 1, "pairs_per_room": 2, "kind": "bathroom"}  # the quickest rooms


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


def test_pairs_are_kept_and_parts_share_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = RoomPairsConfig(**TINY, cache=cache)
    data, test = config.build("train"), config.build("test")
    assert (len(data), len(test)) == (2, 2)
    first, other = data.get(0), data.get(1)
    assert first.image.shape == first.reference.shape == (3, 48, 48)  # type: ignore[union-attr]
    assert first.truth is None
    assert not torch.equal(first.image, first.reference)  # type: ignore[arg-type]
    assert not torch.equal(first.image, other.image)
    assert not torch.equal(first.image, test.get(0).image)
    monkeypatch.setattr(module, "build_room", lambda *a, **k: pytest.fail("built again"))
    for again in (pickle.loads(pickle.dumps(data)), config.build("train")):
        assert torch.equal(again.get(0).image, first.image)
    monkeypatch.undo()
    path = data._folder / "0.npz"
    path.write_bytes(b"junk")
    assert torch.equal(config.build("train").get(0).image, first.image)
    assert "rendering the room again" in caplog.text
    assert RoomPairsConfig(**{**TINY, "seed": 1}, cache=cache).build("train")._folder != data._folder
    with pytest.raises(DataError, match="unknown split 'all'"):
        config.build("all")


def test_windows_are_drawn_apart_without_truth_and_together_with_it(cache: Path) -> None:
    still = ColorJitterConfig(brightness=0, contrast=0, saturation=0)
    plain = RoomPairsConfig(**{**TINY, "crop": 40}, cache=cache, augment=still).build("train")
    first, second = plain.read(0)
    whole = RoomPairsConfig(**{**TINY, "crop": 40}, truth="disparity", cache=cache, augment=still).build("train")

    def corner(image: torch.Tensor, window: torch.Tensor) -> tuple[int, int]:
        window = (denormalize_images(window) * 255).round().byte()
        return next((r, c) for r in range(9) for c in range(9) if torch.equal(image[:, r : r + 40, c : c + 40], window))

    places = []
    for seed in range(6):
        sample = plain.get(0, np.random.default_rng(seed))
        places.append((corner(first, sample.image), corner(second, sample.reference)))  # type: ignore[arg-type]
        sample = whole.get(0, np.random.default_rng(seed))
        left, right = whole.read(0)
        row, column = corner(left, sample.image)
        assert corner(right, sample.reference) == (row, column)  # type: ignore[arg-type]
        assert torch.equal(sample.truth, whole.truth(0)[:, row : row + 40, column : column + 40])  # type: ignore[index, arg-type]
    assert any(a != b for a, b in places)


@pytest.mark.parametrize("truth", ["flow", "disparity"])
def test_truth_carries_the_second_picture_onto_the_first(cache: Path, truth: str) -> None:
    data = RoomPairsConfig(**{**TINY, "size": 96, "crop": 96}, truth=truth, cache=cache).build("train")  # type: ignore[arg-type]
    warped_errors, errors = [], []
    for row in range(2):
        sample = data.get(row)
        assert sample.truth is not None
        known = sample.truth.isfinite().all(0)
        assert 0.3 < float(known.float().mean()) < 1
        motion = sample.truth if truth == "flow" else torch.cat([-sample.truth, torch.zeros_like(sample.truth)])
        place = (pixel_centers(96, 96) + torch.where(known, motion, 0.0).permute(1, 2, 0)) / 48 - 1
        images = [denormalize_images(image) for image in (sample.image, sample.reference)]  # type: ignore[arg-type]
        warped = grid_sample(images[1][None], place[None], align_corners=False)[0]
        inside = known & (place.abs() < 1).all(-1)
        warped_errors.append(float((warped - images[0]).abs().mean(0)[inside].median()))
        errors.append(float((images[1] - images[0]).abs().mean(0)[inside].median()))
    assert max(warped_errors) < 0.02
    assert sum(errors) > 3 * sum(warped_errors)


def test_depth_and_normals_agree(cache: Path) -> None:
    depth = RoomPairsConfig(**TINY, truth="depth", views=1, cache=cache).build("train").get(0)
    normals = RoomPairsConfig(**TINY, truth="normals", views=1, cache=cache).build("train").get(0)
    assert depth.reference is None
    assert torch.equal(depth.image, normals.image)
    assert depth.truth is not None
    assert normals.truth is not None
    assert depth.truth.shape == (1, 48, 48)
    known = depth.truth[0].isfinite()
    assert 0.3 < float(depth.truth[0][known].median()) < 8
    found = normals.truth.isfinite().all(0)
    assert 0.2 < float(found.float().mean()) < 1
    assert torch.allclose(normals.truth[:, found].norm(dim=0), torch.ones(int(found.sum())), atol=1e-5)
    pair = RoomPairsConfig(**TINY, truth="depth", cache=cache).build("train").get(0)
    assert pair.reference is not None


def test_normals_of_a_plane_are_exact() -> None:
    normal = torch.tensor([0.3, -0.8, -0.52]) / torch.tensor([0.3, -0.8, -0.52]).norm()
    k = intrinsics_from_fov(70, 20, 16)
    rays = torch.cat([(pixel_centers(16, 20) - k[:2, 2]) / k[0, 0], torch.ones(16, 20, 1)], -1)
    depth = -2.0 / (rays @ normal)
    depth = torch.where(depth > 0, depth, 0.0)  # above its horizon a plane is not seen
    found = normals_from_depth(depth, k)
    known = found.isfinite().all(0)
    assert bool(known[10, 10])
    assert not bool(known[0].any())
    assert torch.allclose(found[:, known], normal[:, None].expand(-1, int(known.sum())), atol=1e-3)
    step = torch.full((9, 9), 1.0)
    step[:, 5:] = 2.0
    found = normals_from_depth(step, intrinsics_from_fov(70, 9, 9))
    assert found[:, 4, 2].tolist() == pytest.approx([0, 0, -1], abs=1e-6)
    assert math.isinf(found[0, 4, 4])  # an edge
    assert math.isinf(found[0, 4, 5])


def test_loader(cache: Path) -> None:
    data = RoomPairsConfig(**TINY, truth="flow", cache=cache).build("train")
    batch = next(build_loader(data, 2, seed=0))
    assert batch.image.shape == batch.reference.shape == (2, 3, 48, 48)
    assert batch.truth.shape == (2, 2, 48, 48)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 100}, {"resize": 256}, {"overlap": (0.9, 0.4)}, {"truth": "pose"}, {"views": 3}, {"views": 1}, {"baseline": (0.0, 0.1)},
     {"kind": "cave"}, {"rooms": 0}, {"fov": 10.0}],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RoomPairsConfig(**wrong)  # type: ignore[arg-type]
