"""Furnished rooms: plans, surfels, pictures, and whether what is claimed of them is true."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from geossl.data.simulate import (
    KINDS,
    Room,
    RoomError,
    SensorOptions,
    View,
    ViewOptions,
    build_room,
    camera_path,
    fuse_views,
    make_pair,
    optical_flow,
    radiance_grid,
    sample_pair,
    sample_view,
    sample_views,
    sense,
)
from geossl.data.simulate import surfels as surfels_module
from geossl.data.simulate.catalogue import ROLES, candidates, object_size, surface_height
from geossl.data.simulate.furnish import make_plan
from geossl.data.simulate.surfels import Occupancy, object_surfels, prepare_object
from geossl.data.simulate.views import clearance
from geossl.errors import ConfigError, DataError, UnknownNameError
from geossl.geometry import box_corners, look_at, pixel_centers, points_in_boxes, project

SMALL = ViewOptions(width=80, height=64)


pytestmark = pytest.mark.usefixtures("surfel_cache")


@pytest.fixture(scope="module")
def room(surfel_cache: Path) -> Room:
    return build_room(0, 22, max_objects=8)


@pytest.fixture(scope="module")
def view(room: Room) -> View:
    return sample_view(room, room.rng(0), SMALL)


def test_every_role_has_objects() -> None:
    assert [role for role in ROLES if not candidates(role)] == []
    assert surface_height(candidates("coffee table")[0]) < 0.6


def test_plans_are_furnished_without_collision() -> None:
    kinds = set()
    for seed in range(60):
        plan = make_plan(np.random.default_rng(seed))
        kinds.add(plan.kind)
        assert 4 <= len(plan.items) <= 15
        for number, item in enumerate(plan.items):
            hx, hy = item.half
            assert plan.inside(item.x, item.y, hx, hy), (seed, item)
            assert item.z >= -1e-6
            assert item.top <= plan.size[2] + 1e-3
            for other in plan.items[:number]:
                ox, oy = other.half
                apart = max(abs(item.x - other.x) - hx - ox, abs(item.y - other.y) - hy - oy, item.z - other.top, other.z - item.top)
                on_it = abs(item.z - 0.003 - surface_height(other.row) - other.z) < 1e-3
                at_table = {"chair"} & {item.role, other.role} and {"dining table", "desk"} & {item.role, other.role}
                assert apart > -1e-3 or on_it or at_table or item.role == "office chair", (seed, item, other)
        for opening in plan.doors:  # nothing stands in the way
            wall = plan.walls[opening.wall]
            x, y = wall.point((opening.s0 + opening.s1) / 2, 0.4)
            assert not any(abs(x - i.x) < i.half[0] and abs(y - i.y) < i.half[1] and i.z < 2.0 for i in plan.items), seed
        for opening in (*plan.windows, *plan.doors, *plan.pictures):
            assert 0 <= opening.s0 < opening.s1 <= plan.walls[opening.wall].length
    assert kinds == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_asked_for(kind: str) -> None:
    plan = make_plan(np.random.default_rng(1), kind)
    assert plan.kind == kind
    corners = np.array(plan.outline)
    area = 0.5 * (corners[:, 0] * np.roll(corners[:, 1], -1) - np.roll(corners[:, 0], -1) * corners[:, 1]).sum()
    assert 0 < area <= plan.size[0] * plan.size[1] + 1e-6  # counter-clockwise


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "bedroom", "size": (1.5, 1.3, 2.5)}, RoomError, r"no place for a (single )?bed \(the smallest takes .*seed 3, room 5"),
        ({"kind": "kitchn"}, UnknownNameError, "unknown kind of room 'kitchn'; did you mean 'kitchen'"),
        ({"size": (0.5, 4.0, 2.5)}, RoomError, "1 to 20 m along x and y"),
        ({"max_objects": 3}, RoomError, "max_objects must be a whole number of at least 4, got 3"),
        ({"max_objects": float("nan")}, RoomError, "max_objects must be a whole number of at least 4, got nan"),
        ({"size": (4, 4)}, RoomError, r"size must be three numbers, .* got \(4, 4\)"),
        ({"size": "abc"}, RoomError, "size must be three numbers, .* got 'abc'"),
        ({"size": (4.0, 4.0, float("nan"))}, RoomError, "size must be three numbers"),
        ({"size": (4.0, float("nan"), 2.5)}, RoomError, "size must be three numbers"),
        ({"detail": 0.0}, RoomError, "detail must be positive"),
        ({"detail": float("inf")}, RoomError, "detail must be positive and at most 8"),
        ({"detail": "fine"}, RoomError, "detail must be positive and at most 8, got 'fine'"),
        ({"seed": -1}, RoomError, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 1.5}, RoomError, "seed must be a whole number of at least 0, got 1.5"),
        ({"seed": "a"}, RoomError, "seed must be a whole number of at least 0, got 'a'"),
        ({"seed": None}, RoomError, "seed must be a whole number of at least 0, got None"),
        ({"number": -1}, RoomError, "number must be a whole number of at least 0, got -1"),
        ({"number": 0.5}, RoomError, "number must be a whole number of at least 0, got 0.5"),
    ],
)
def test_rooms_that_cannot_be_say_why(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_room(**{"seed": 3, "number": 5, **arguments})


def test_a_seed_and_a_number_are_a_room(room: Room) -> None:
    again = build_room(0, 22, max_objects=8)
    for name in ("means", "quats", "scales", "colors", "solid", "instance", "boxes", "labels", "rows"):
        assert torch.equal(getattr(room, name), getattr(again, name)), name
    other = build_room(0, 23, max_objects=4, detail=0.5)
    assert other.plan != room.plan
    assert len(other) < len(room)
    assert room.rng(1).random() == again.rng(1).random()
    assert room.rng(1).random() != room.rng(2).random()


def test_surfels_are_sound(room: Room) -> None:
    for name in ("means", "quats", "scales", "colors"):
        assert bool(getattr(room, name).isfinite().all()), name
    assert float(room.scales.min()) > 0
    assert torch.allclose(room.quats.norm(dim=1), torch.ones(len(room)), atol=1e-5)
    assert 0 <= float(room.colors.min()) <= float(room.colors.max()) <= 1
    assert room.instance.unique().tolist() == list(range(len(room.boxes) + 1))
    objects = room.instance > 0
    owner = room.instance[objects] - 1
    inside = points_in_boxes(room.means[objects], room.boxes, margin=0.02).gather(1, owner[:, None])
    assert float(inside.float().mean()) > 0.999
    assert bool((box_corners(room.boxes)[..., 2] > -0.01).all())


def test_the_size_of_a_box_is_that_of_the_table(room: Room) -> None:
    for box, row in zip(room.boxes, room.rows.tolist(), strict=True):
        assert torch.allclose(box[3:6], torch.tensor(object_size(row)), atol=0.02 + 0.05 * max(object_size(row)))


def shell_depth(view: View, size: tuple[float, float, float]) -> torch.Tensor:
    """Depth of the box that a room without a notch is."""
    pose = view.camera.world_to_cam
    pixel = torch.cat([pixel_centers(*view.depth.shape), torch.ones(*view.depth.shape, 1)], -1)
    ray = pixel @ torch.linalg.inv(view.camera.intrinsics).mT @ pose[:3, :3]
    low, high = -view.camera.centers / ray, (torch.tensor(size) - view.camera.centers) / ray
    return torch.maximum(low, high).amin(-1)


def test_depth_is_that_of_the_walls(room: Room, view: View) -> None:
    assert room.plan.notch is None
    error = (view.depth - shell_depth(view, room.plan.size)).abs()[view.valid & (view.instance == 0)]
    assert len(error) > 1500
    assert float(error.median()) < 0.002
    assert float(error.quantile(0.9)) < 0.11  # reveals of windows, doors, pictures and rugs stand off the box by up to a hand


def test_depth_of_bare_walls_is_exact() -> None:
    bare = build_room(0, 4, kind="hobby room", size=(5.0, 4.0, 2.6), max_objects=4)
    away = replace(bare, plan=replace(bare.plan, items=[], windows=[]))
    pose = sample_view(away, bare.rng(0), ViewOptions(width=224, height=168)).camera
    # Only the walls: everything that stands out of them is taken away.
    near = torch.minimum(bare.means, torch.tensor(bare.plan.size) - bare.means).amin(1)
    keep = (bare.instance == 0) & (near.abs() < 2e-3)
    rows = keep.nonzero()[:, 0]
    walls = replace(
        bare, means=bare.means[rows], quats=bare.quats[rows], scales=bare.scales[rows], colors=bare.colors[rows], solid=bare.solid[rows],
        instance=bare.instance[rows], _table=bare._table[:, rows].contiguous(),
    )  # fmt: skip
    seen = walls.render(pose)
    error = (seen.depth - shell_depth(seen, bare.plan.size)).abs()[seen.valid]
    assert float(seen.valid.float().mean()) > 0.85  # windows are holes here
    assert float(error.quantile(0.95)) < 1e-5
    assert float(error.quantile(0.99)) < 0.02


def test_pictures_name_what_they_show(room: Room, view: View) -> None:
    assert float((view.instance >= 0).float().mean()) > 0.99
    places = view.points()[view.valid & (view.instance > 0)]
    owner = view.instance[view.valid & (view.instance > 0)] - 1
    assert len(owner) > 200
    assert float(points_in_boxes(places, room.boxes, margin=0.05).gather(1, owner[:, None]).float().mean()) > 0.97
    counts = room.visible_counts(view)
    assert int(counts.sum()) == int((view.instance > 0).sum())
    assert counts.tolist() == [int((view.instance == number + 1).sum()) for number in range(len(room.boxes))]


def test_native_and_reference_paint_the_same(room: Room) -> None:
    camera = sample_view(room, room.rng(0), ViewOptions(width=32, height=24)).camera
    a, b = room.render(camera), room.render(camera, backend="reference")
    assert torch.allclose(a.rgb, b.rgb, atol=2e-4)
    assert float((a.instance == b.instance).float().mean()) > 0.995
    both = a.valid & b.valid
    assert torch.allclose(a.depth[both], b.depth[both], rtol=2e-3)


def test_a_camera_that_looks_away_sees_nothing(room: Room) -> None:
    eye = torch.tensor([-5.0, -5.0, 1.5])
    camera = SMALL.cameras(look_at(eye, eye - torch.tensor([1.0, 1.0, 0.0])))
    seen = room.render(camera)
    assert seen.rgb.shape == (64, 80, 3)
    assert not bool(seen.rgb.any())
    assert not bool(seen.depth.any())
    assert bool((seen.instance == -1).all())
    assert not bool(seen.valid.any())
    assert room.visible_counts(seen).tolist() == [0] * len(room.boxes)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["world_to_cam", "intrinsics"])
def test_a_singular_camera_is_refused(room: Room, view: View, name: str, value: float) -> None:
    camera = replace(view.camera, **{name: torch.full_like(getattr(view.camera, name), value)})
    with pytest.raises(ValueError, match=f"Room.render: {name} must be finite and invertible"):
        room.render(camera)


def test_pictures_need_one_camera_and_a_sensible_size(room: Room) -> None:
    with pytest.raises(ValueError, match="takes one camera"):
        room.render(camera_path(room, 2, room.rng(0), SMALL))
    with pytest.raises(ConfigError, match="width must be at least 8"):
        ViewOptions(width=4)
    with pytest.raises(ConfigError, match="fov"):
        ViewOptions(fov=5.0)


@pytest.fixture(scope="module")
def pair(room: Room):
    return sample_pair(room, room.rng(5), ViewOptions(width=128, height=96))


def warp(image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Sample ``image [H, W, C]`` at pixels ``[H, W, 2]``."""
    height, width = image.shape[:2]
    grid = place / torch.tensor([width, height]) * 2 - 1
    return torch.nn.functional.grid_sample(image.permute(2, 0, 1)[None], grid[None], align_corners=False)[0].permute(1, 2, 0)


def test_flow_warps_one_view_to_the_other(pair) -> None:
    assert 0.4 <= pair.overlap <= 0.9
    for first, second, flow, seen in (
        (pair.first, pair.second, pair.flow, pair.covisible),
        (pair.second, pair.first, pair.flow_back, pair.covisible_back),
    ):
        place = pixel_centers(96, 128) + flow
        error = (warp(second.rgb, place) - first.rgb).abs().mean(-1)[seen]
        unwarped = (second.rgb - first.rgb).abs().mean(-1)[seen]
        assert float(error.mean()) < 0.01
        assert float(error.mean()) < 0.2 * float(unwarped.mean())
        pixels, depth = project(first.points().flatten(0, 1), second.camera.world_to_cam, second.camera.intrinsics)
        assert torch.allclose(pixels.view(96, 128, 2)[seen], place[seen], atol=1e-3)
        found = warp(second.depth[..., None], place)[..., 0][seen]
        off = (found - depth.view(96, 128)[seen]).abs()
        assert float(off.median()) < 0.0005
        assert float((off > 0.05).float().mean()) < 0.03
    relative = pair.first_to_second @ pair.first.camera.world_to_cam
    assert torch.allclose(relative, pair.second.camera.world_to_cam, atol=1e-5)


def test_a_wrong_pose_is_noticed(pair) -> None:
    """The warp test can fail: with the second camera moved by 20 cm the same comparison is far off."""
    moved = pair.second.camera.world_to_cam.clone()
    moved[0, 3] += 0.2
    wrong = replace(pair.second, camera=replace(pair.second.camera, world_to_cam=moved))
    flow, _ = optical_flow(pair.first, wrong)
    error = (warp(pair.second.rgb, pixel_centers(96, 128) + flow) - pair.first.rgb).abs().mean(-1)[pair.covisible]
    right = (warp(pair.second.rgb, pixel_centers(96, 128) + pair.flow) - pair.first.rgb).abs().mean(-1)[pair.covisible]
    assert float(error.mean()) > 3 * float(right.mean())


def test_a_view_covers_itself(view: View) -> None:
    same = make_pair(view, view)
    assert torch.equal(same.covisible, view.valid)
    assert float(same.flow[view.valid].abs().max()) < 1e-3
    assert same.overlap == pytest.approx(float(view.valid.float().mean()))


def test_a_walk_is_smooth_and_free(room: Room) -> None:
    cameras = camera_path(room, 60, room.rng(2), SMALL)
    eyes = cameras.centers.numpy()
    assert len(cameras) == 60
    assert ((eyes[:, 2] > 1.3) & (eyes[:, 2] < 1.7)).all()
    assert (clearance(room.plan, eyes[:, 0], eyes[:, 1]) > 0.05).all()
    steps = np.linalg.norm(np.diff(eyes, axis=0), axis=1)
    assert steps.max() < 3 * np.median(steps)
    forward = cameras.world_to_cam[:, 2, :3]
    assert float((forward[1:] * forward[:-1]).sum(1).min()) > 0.8
    assert torch.equal(cameras.world_to_cam, camera_path(room, 60, room.rng(2), SMALL).world_to_cam)


def test_a_cheap_camera_has_faults(view: View) -> None:
    noisy = sense(view, np.random.default_rng(0))
    again = sense(view, np.random.default_rng(0))
    assert torch.equal(noisy.rgb, again.rgb)
    assert torch.equal(noisy.depth, again.depth)
    hole = noisy.depth == 0
    assert 0.01 < float(hole.float().mean()) < 0.6
    assert not bool((noisy.valid & hole).any())
    error = (noisy.depth - view.depth)[~hole].abs()
    assert 0 < float(error.median()) < 0.03
    clean = SensorOptions(exposure=0, white_balance=0, rgb_noise=0, depth_noise=0, depth_step=0, grazing=0, dark=0, holes=0, max_depth=99)
    ideal = sense(view, np.random.default_rng(0), clean)
    assert torch.allclose(ideal.rgb, view.rgb, atol=1e-4)
    assert torch.equal(ideal.depth, torch.where(view.valid, view.depth, 0.0))
    with pytest.raises(ConfigError, match="holes"):
        SensorOptions(holes=1.5)


def test_clouds_are_fused_from_what_is_seen(room: Room) -> None:
    views = sample_views(room, 2, room.rng(3), SMALL)
    cloud, instance = fuse_views(views, 3000, np.random.default_rng(0))
    assert cloud.coord.shape == (3000, 3)
    assert cloud.feats is not None
    assert cloud.feats.shape == (3000, 3)
    assert instance.shape == (3000,)
    assert bool((cloud.coord > -0.2).all())
    assert bool((cloud.coord < torch.tensor(room.plan.size) + 0.2).all())
    with pytest.raises(DataError, match="got no views"):
        fuse_views([], 10, np.random.default_rng(0))
    with pytest.raises(DataError, match="points must be at least 1, got -1"):
        fuse_views(views, -1, np.random.default_rng(0))
    blind = replace(views[0], valid=torch.zeros_like(views[0].valid))
    with pytest.raises(DataError, match="none of the 1 views has a pixel with depth"):
        fuse_views([blind], 10, np.random.default_rng(0))


def test_grids_hold_the_room(room: Room, tmp_path: Path) -> None:
    grid = radiance_grid(room, 48)
    assert max(grid.rgbsigma.shape[:3]) == 48
    assert grid.rgbsigma.shape[3] == 4
    edge = (grid.bbox_max - grid.bbox_min) / (np.array(grid.rgbsigma.shape[:3]) - 1)
    assert np.allclose(edge, edge[0], rtol=1e-5)  # cubes
    alpha = np.clip(1 - np.exp(-np.exp(grid.rgbsigma[..., 3].astype(np.float64)) / 100), 0, 1)
    assert np.allclose(alpha, radiance_grid(room, 48, "alpha").rgbsigma[..., 3], atol=1e-5)
    assert 0.02 < (alpha > 0.01).mean() < 0.4  # mostly empty
    # Where a surfel is, the grid is opaque and of its colour.
    rows = torch.arange(0, len(room), 97)
    cells = np.rint((room.means[rows].numpy() - grid.bbox_min) / edge).astype(int)
    inside = (cells < grid.rgbsigma.shape[:3]).all(1) & (cells >= 0).all(1)
    found = grid.rgbsigma[tuple(cells[inside].T)]
    assert np.median(alpha[tuple(cells[inside].T)]) > 0.8
    assert np.median(np.abs(found[:, :3] - room.colors[rows].numpy()[inside]).mean(1)) < 0.08
    centers = grid.boxes[:, :3] * edge + grid.bbox_min
    assert np.allclose(centers, room.boxes[:, :3].numpy(), atol=1e-4)
    assert np.allclose(grid.boxes[:, 3:6] * edge, room.boxes[:, 3:6].numpy(), atol=1e-4)
    grid.save(tmp_path, "scene_1")
    with np.load(tmp_path / "features" / "scene_1.npz") as stored:
        assert np.array_equal(stored["rgbsigma"], grid.rgbsigma)
        assert stored["resolution"].tolist() == list(grid.rgbsigma.shape[:3])
        assert {"bbox_min", "bbox_max", "scale", "offset", "from_mitsuba"} <= set(stored.files)
    assert np.load(tmp_path / "obb" / "scene_1.npy").shape == (len(room.boxes), 7)
    with pytest.raises(ConfigError, match="resolution must be at least 8"):
        radiance_grid(room, 4)


def test_light_rays_stop_where_something_is(rng: np.random.Generator) -> None:
    points = rng.uniform(0, 1, (200, 3)).astype(np.float32)
    grid = Occupancy(points, 0.05)
    start = rng.uniform(-0.5, 1.5, (500, 3)).astype(np.float32)
    direction = rng.normal(size=(500, 3)).astype(np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    expected = np.ones(500, dtype=bool)
    for distance in np.arange(0.01, 0.8, 0.0025):
        cells = np.floor((start + direction * distance - grid.origin) / grid.cell).astype(int)
        inside = ((cells >= 0) & (cells < grid.shape)).all(1)
        cells = np.clip(cells, 0, grid.shape - 1)
        expected &= ~(inside & grid.filled[(cells[:, 0] * grid.shape[1] + cells[:, 1]) * grid.shape[2] + cells[:, 2]])
    assert (grid.free(start, direction, 0.01, 0.8, 0.01) == expected).mean() > 0.98
    assert 0.3 < expected.mean() < 0.99
    assert Occupancy(np.zeros((0, 3)), 0.1).free(start, direction, 0.0, 1.0, 0.1).all()


def test_surfels_end_at_the_edges_of_an_object() -> None:
    row = candidates("wardrobe")[0]
    made = prepare_object(row)
    size = np.array(object_size(row))
    across = np.cross(made.normal, made.tangent)
    rim = np.concatenate(
        [made.center + side * 1.5 * made.sigma[:, axis, None] * (made.tangent, across)[axis] for side in (1, -1) for axis in (0, 1)]
    )
    out = np.maximum(np.abs(rim[:, :2]) - size[:2] / 2, 0).max(1)
    assert np.quantile(out, 0.98) < 0.03
    outward = (made.normal[:, :2] * made.center[:, :2]).sum(1)[made.solid & (np.abs(made.normal[:, 2]) < 0.3)]
    assert (outward > 0).mean() > 0.9  # turned out of the body


def test_prepared_objects_are_kept_and_checked(
    surfel_cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = candidates("clock")[0]
    object_surfels.cache_clear()
    monkeypatch.setenv("GEOSSL_CACHE", str(tmp_path / "fresh"))
    cache = tmp_path / "fresh"
    stale, mine = cache / "surfels-0123456789abcdef", cache / "surfels-mine"
    stale.mkdir(parents=True)
    mine.mkdir()
    made = object_surfels(row)
    (file,) = cache.glob(f"surfels-*/{row}.npz")
    assert not stale.exists()  # of another version
    assert mine.exists()
    assert not list(cache.glob("surfels-*/.*"))
    with pytest.raises(ValueError, match="read-only"):
        made.center[0] = 0
    object_surfels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(surfels_module, "prepare_object", lambda row: pytest.fail("prepared again"))
        assert np.array_equal(object_surfels(row).center, made.center)
    file.write_bytes(file.read_bytes()[:100])
    object_surfels.cache_clear()
    assert np.array_equal(object_surfels(row).center, made.center)
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("GEOSSL_CACHE", str(blocked))
    object_surfels.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(object_surfels(row).center, made.center)
    assert "set GEOSSL_CACHE" in caplog.text
