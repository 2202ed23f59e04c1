"""What images see in common, worked out by hand and by a plain loop; scores, thresholds and the choice of pairs; corresponding windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geossl.data.pair_crops import (
    CroppedPair,
    corresponding_boxes,
    cut,
    quarter_turns,
    read_crop_list,
    relative_roll,
    write_crop_list,
)
from geossl.data.pair_mining import (
    DepthGeometry,
    MiningOptions,
    PointGeometry,
    choose_pairs,
    mine_pairs,
    overlap_iou,
    pair_scores,
    view_angles,
)
from geossl.errors import ConfigError, DataError
from geossl.geometry import look_at, rotation_about_z

K = torch.tensor([[16.0, 0.0, 16.0], [0.0, 16.0, 12.0], [0.0, 0.0, 1.0]])  # 32 x 24, 90 degrees wide


def wall(*cameras: tuple[float, float, float], origin: float = 0.0, tolerance: float = 0.05) -> DepthGeometry:
    """Cameras at (x, distance, yaw in degrees) before a wall without end, y = 0, all looking towards it."""
    poses, depths = [], []
    for x, distance, yaw in cameras:
        eye = torch.tensor([origin + x, -distance, 0.0], dtype=torch.float64)
        towards = torch.tensor([math.sin(math.radians(yaw)), math.cos(math.radians(yaw)), 0.0], dtype=torch.float64)
        poses.append(look_at(eye, eye + towards))
        rays = torch.stack(torch.meshgrid(torch.arange(24) + 0.5, torch.arange(32) + 0.5, indexing="ij")[::-1], -1).double()
        rays = torch.cat([(rays - K[:2, 2]) / 16, torch.ones(24, 32, 1)], -1) @ poses[-1][:3, :3]  # in the world
        depth = distance / rays[..., 1]
        depths.append(torch.where(depth > 0, depth, 0.0))
    return DepthGeometry(torch.stack(depths).float(), K.expand(len(cameras), 3, 3), torch.stack(poses), tolerance, points=10**6)


def test_shares_of_a_wall_by_hand() -> None:
    # Before the wall at 2 m an image is 4 m wide: moved by 1, 2 and 4 m, three quarters, half and nothing is seen by both.
    shares = wall((0, 2, 0), (1, 2, 0), (2, 2, 0), (4, 2, 0)).shares()
    assert shares[0].tolist() == pytest.approx([1, 0.75, 0.5, 0])
    assert overlap_iou(shares)[0].tolist() == pytest.approx([1, 0.6, 1 / 3, 0])
    # From twice as far, all of the near image is seen, and the near one sees a quarter: the surfaces' IoU is that too.
    shares = wall((0, 2, 0), (0, 4, 0)).shares()
    assert shares[0, 1] == pytest.approx(1)
    assert shares[1, 0] == pytest.approx(0.25)
    assert overlap_iou(shares)[0, 1] == pytest.approx(0.25)


def test_what_is_hidden_or_unknown_does_not_count() -> None:
    geometry = wall((0, 2, 0), (0, 2, 0), (0, 2, 0))
    depth = geometry.depth.clone()
    depth[1, :, :16] = 1.0  # something stands before the left half
    depth[2, :, :8] = 0.0  # unknown
    geometry = DepthGeometry(depth, K.expand(3, 3, 3), geometry.world_to_cam, 0.05, points=10**6)
    shares = geometry.shares()
    assert shares[0, 1] == pytest.approx(0.5)
    assert shares[1, 0] == pytest.approx(0.5)
    assert shares[0, 2] == pytest.approx(1)  # of what could be compared
    assert shares[2, 1] == pytest.approx(16 / 24)
    blind = DepthGeometry(torch.zeros(2, 24, 32), K.expand(2, 3, 3), geometry.world_to_cam[:2])
    assert blind.shares().tolist() == [[0, 0], [0, 0]]


def test_places_behind_a_camera_are_not_seen() -> None:
    shares = wall((0, 2, 0), (0, 2, 180)).shares()
    assert shares[0].tolist() == [1, 0]


def test_shares_agree_with_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    depth = torch.from_numpy(rng.uniform(1, 3, (3, 6, 8))).float()
    depth[rng.random((3, 6, 8)) < 0.2] = 0
    k = torch.tensor([[6.0, 0.0, 4.1], [0.0, 5.0, 3.2], [0.0, 0.0, 1.0]])
    poses = torch.stack([look_at(torch.from_numpy(rng.normal(0, 0.3, 3)), torch.from_numpy(rng.normal([0, 3, 0], 0.3))) for _ in range(3)])
    geometry = DepthGeometry(depth, k.expand(3, 3, 3), poses, 0.3, points=10**6)
    shares = geometry.shares()
    for i in range(3):
        for j in range(3):
            seen, compared, matches = 0, 0, []
            for row, column in np.ndindex(6, 8):
                z = float(depth[i, row, column])
                if z == 0:
                    continue
                ray = torch.tensor([(column + 0.5 - 4.1) / 6, (row + 0.5 - 3.2) / 5, 1.0], dtype=torch.float64)
                world = poses[i][:3, :3].T @ (ray * z - poses[i][:3, 3])
                x, y, depth_there = (poses[j][:3, :3] @ world + poses[j][:3, 3]).tolist()
                u, v = 6 * x / depth_there + 4.1, 5 * y / depth_there + 3.2
                compared += 1
                if depth_there > 0 and 0 <= u < 8 and 0 <= v < 6:
                    found = float(depth[j, int(v), int(u)])
                    compared -= found == 0
                    if found > 0 and abs(found - depth_there) <= 0.3 * depth_there:
                        seen += 1
                        matches.append((u / 8, v / 6))
            assert shares[i, j] == pytest.approx(seen / compared, abs=1e-6)
            here, there, everywhere = geometry.matches(i, j)
            assert len(everywhere) == int((depth[i] > 0).sum())
            assert torch.allclose(there, torch.tensor(matches).float(), atol=1e-5)
            assert len(here) == len(there)


def test_far_from_the_origin_nothing_changes() -> None:
    near, far = (wall((0, 2, 0), (1, 2, 10), (0.5, 3, -20), origin=origin).shares() for origin in (0.0, 1e6))
    assert torch.allclose(near, far, atol=0.01)


def test_sparse_looking_is_close() -> None:
    full = wall((0, 2, 0), (1, 2, 10), (0.5, 3, -20))
    few = DepthGeometry(full.depth, K.expand(3, 3, 3), full.world_to_cam, points=200)
    assert torch.allclose(full.shares(), few.shares(), atol=0.05)


def test_poses_must_be_finite() -> None:
    geometry = wall((0, 2, 0), (1, 2, 0))
    poses = geometry.world_to_cam.clone()
    poses[1, 0, 3] = math.inf
    with pytest.raises(DataError, match="poses and intrinsics must be finite"):
        DepthGeometry(geometry.depth, K.expand(2, 3, 3), poses)


def test_points_of_structure_from_motion() -> None:
    seen = [np.array([1, 5, 9, 12]), np.array([5, 9, 30]), np.array([40, 41])]
    places = [np.linspace(0, 1, 2 * len(points)).reshape(-1, 2).astype(np.float32) for points in seen]
    geometry = PointGeometry(seen, places, torch.eye(4).expand(3, 4, 4))
    shares = geometry.shares()
    assert shares.tolist() == [[1, 0.5, 0], [pytest.approx(2 / 3), 1, 0], [0, 0, 1]]
    assert overlap_iou(shares)[0, 1] == pytest.approx(2 / 5)  # of the sets
    here, there, everywhere = geometry.matches(0, 1)
    assert torch.equal(here, torch.from_numpy(places[0][1:3]))
    assert torch.equal(there, torch.from_numpy(places[1][:2]))
    assert len(everywhere) == 4


def test_angles_and_scores() -> None:
    angle = view_angles(wall((0, 2, 0), (0, 2, 60), (0, 2, -30)).world_to_cam)
    assert angle[0].tolist() == pytest.approx([0, 60, 30], abs=1e-3)
    assert angle[1, 2] == pytest.approx(90)
    iou = torch.tensor([0.5, 0.5, 0.5, 0.5])
    score = pair_scores(iou, torch.tensor([0.0, 60.0, 90.0, 25.0]))
    cosine = math.cos(math.radians(25))
    assert score.tolist() == pytest.approx([0, 0.5, 0, 0.5 * 4 * cosine * (1 - cosine)], abs=1e-6)


def test_choice_by_hand() -> None:
    """Images 0 and 1 are nearly the same, as are 2 and 3; 4 sees little of the others."""
    iou = torch.eye(5)
    for i, j, value in (
        (0, 1, 0.8),
        (2, 3, 0.78),
        (0, 2, 0.5),
        (0, 3, 0.45),
        (1, 2, 0.48),
        (1, 3, 0.4),
        (0, 4, 0.25),
        (2, 4, 0.1),
        (3, 4, 0.3),
    ):
        iou[i, j] = iou[j, i] = value
    angle = torch.full((5, 5), 60.0)
    angle[1, 3] = angle[3, 1] = 85.0
    score = pair_scores(iou, angle)
    everything = choose_pairs(iou, angle, score, MiningOptions(redundant=None, max_iou=0.79))
    assert everything.pairs.tolist() == [[2, 3], [0, 2], [1, 2], [0, 3], [3, 4], [0, 4]]
    assert everything.iou.tolist() == pytest.approx([0.78, 0.5, 0.48, 0.45, 0.3, 0.25])
    assert everything.rejected == {"too little in common": 1, "too much in common": 1, "directions too different": 1}
    chosen = choose_pairs(iou, angle, score, MiningOptions(max_iou=0.7))
    # (0, 2) is best; 1 and 3 are like 0 and 2, so only 4 is left, without a partner.
    assert chosen.pairs.tolist() == [[0, 2]]
    assert chosen.rejected["like a better pair"] == 4
    looser = choose_pairs(iou, angle, score, MiningOptions(max_iou=0.7, redundant=0.79))
    assert looser.pairs.tolist() == [[0, 2], [3, 4]]
    strict = choose_pairs(iou, angle, score, MiningOptions(max_iou=0.7, redundant=None, min_score=0.46))
    assert strict.pairs.tolist() == [[0, 2], [1, 2]]


def test_two_different_places_make_no_pair() -> None:
    mined = mine_pairs(wall((0, 2, 0), (0.5, 2, 15), (100, 2, 0), (100.5, 2, 15)), MiningOptions(redundant=None))
    assert mined.pairs.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "wrong", [{"min_iou": 0.95}, {"min_iou": 0.0}, {"max_angle": 91.0}, {"redundant": 1.0}, {"tolerance": 0.0}, {"min_known": 1.1}]
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MiningOptions(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def test_corresponding_windows() -> None:
    matches = wall((0, 2, 0), (1, 2, 0)).matches(0, 1)  # the second image shows everything a quarter of its width to the left
    (first, second, seen), *more = corresponding_boxes(matches, (640, 480), (640, 480), 256, 4, 0.4)
    assert first == (160, 640, 0, 480)
    assert second == (0, 480, 0, 480)
    assert seen == pytest.approx(1)
    assert not more  # half of 480 would be below 256
    small = corresponding_boxes(matches, (640, 480), (640, 480), 128, 9, 0.9)
    for (left, right, top, bottom), (left2, right2, top2, bottom2), _ in small[1:]:
        assert right - left in (240, 480)
        assert abs(left - left2 - 160) < 12
        assert abs(right - right2 - 160) < 12
        assert abs(top - top2) < 12
        assert abs(bottom - bottom2) < 12
    assert len(small) > 3


def test_windows_follow_the_distance() -> None:
    (first, second, seen), *_ = corresponding_boxes(wall((0, 2, 0), (0, 4, 0)).matches(0, 1), (64, 48), (64, 48), 16, 1, 0.4)
    assert first[1] - first[0] == pytest.approx(2 * (second[1] - second[0]), abs=3)
    assert seen > 0.8


def test_rotation() -> None:
    upright = look_at(torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    for angle in (0, 30, 90, -90, 170):
        # A camera turned counter-clockwise about its axis (y down: a negative angle about z) takes a picture turned clockwise.
        turned = torch.eye(4)
        turned[:3, :3] = rotation_about_z(torch.tensor(math.radians(angle)))
        assert relative_roll(upright, turned @ upright) == angle
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    picture[0, :, 0] = 255  # red on the left
    turned_picture = cut(picture, (0, 8, 0, 8), 8, turns=1)
    assert turned_picture[0, 7].min() > 200  # is red at the bottom, turned counter-clockwise
    assert [quarter_turns(angle) for angle in (0, 60, -60, 61, 90, 180, -90, 350, 270)] == [0, 0, 0, 1, 1, 2, 3, 0, 3]


def test_crop_lists(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pairs = [
        CroppedPair("a/1.jpg", "b/2.jpg", -88, [((0, 100, 10, 110), (5, 205, 0, 200)), ((1, 2, 3, 4), (5, 6, 7, 8))]),
        CroppedPair("c.jpg", "d.jpg", 0, []),
    ]
    path = tmp_path / "crops.txt"
    path.write_text("# made by hand\n" + "".join(write_crop_list(pairs)))
    assert "a/1.jpg, b/2.jpg, -88\n0, 100, 10, 110, 5, 205, 0, 200\n" in path.read_text()
    assert list(read_crop_list(path)) == pairs
    for text, message in (
        ("a, b, 0\na, b, c\n", "line 2: invalid literal"),
        ("1, 2, 3, 4, 5, 6, 7, 8\n", "line 1: expected 'image1, image2, rotation'"),
        ("a, b, 0\n9, 2, 3, 4, 5, 6, 7, 8\n", "line 2: a window must hold"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            list(read_crop_list(path))
    with pytest.raises(DataError, match=r"x\.jpg: the window \[0, 9, 0, 8\] .* reaches beyond its 8 x 8 pixels"):
        cut(torch.zeros(3, 8, 8, dtype=torch.uint8), (0, 9, 0, 8), 8, source="x.jpg")
