"""Points read the pictures that see them, and no others."""

from __future__ import annotations

import pytest
import torch

from geossl.geometry import Cameras, back_project, intrinsics_from_fov, look_at, pixel_centers
from geossl.layers import lift_features, visible_in


def cameras(views: int = 2, width: int = 32, height: int = 24) -> Cameras:
    eyes = torch.tensor([[0.0, -3.0, 0.2], [0.5, -2.5, 0.4], [-1.0, -2.0, 0.1]])[:views]
    pose = torch.stack([look_at(eye, torch.zeros(3)) for eye in eyes])
    return Cameras(pose, intrinsics_from_fov(60.0, width, height).expand(views, 3, 3), width, height)


def wall_depth(camera: Cameras, y: float = 0.0) -> torch.Tensor:
    """Depth of the plane at that y, everywhere in the picture."""
    rays = back_project(torch.ones(camera.height, camera.width), camera.intrinsics, camera.world_to_cam)
    eye = camera.centers
    return (y - eye[1]) / (rays - eye)[..., 1]


def test_points_read_the_place_where_they_are_seen():
    views = cameras(3)
    depth = torch.stack([wall_depth(views[v]) for v in range(3)])
    maps = torch.stack([pixel_centers(24, 32).permute(2, 0, 1) + 100 * v for v in range(3)])  # where in the picture, and which picture
    row, column = torch.tensor([3, 12, 20]), torch.tensor([5, 16, 30])
    points = back_project(depth[0], views.intrinsics[0], views.world_to_cam[0])[row, column]
    alone = lift_features(points, maps[:1], views[:1], depth[:1])
    torch.testing.assert_close(alone.feats, torch.stack([column + 0.5, row + 0.5], 1), atol=1e-3, rtol=0)
    assert alone.views.tolist() == [1, 1, 1]
    together = lift_features(points, maps, views, depth)
    single = [lift_features(points, maps[v : v + 1], views[v : v + 1], depth[v : v + 1]) for v in range(3)]
    torch.testing.assert_close(together.views, sum(one.views for one in single))
    mean = sum(one.feats for one in single) / together.views[:, None]
    torch.testing.assert_close(together.feats, mean)
    assert together.views.max() == 3


def test_coarse_maps_cover_the_whole_picture():
    view = cameras(1)
    ramp = ((torch.arange(8) + 0.5) / 8).expand(1, 1, 6, 8)
    points = back_project(wall_depth(view[0]), view.intrinsics[0], view.world_to_cam[0])[12, 4:28]
    feats, _ = lift_features(points, ramp, view)
    torch.testing.assert_close(feats[:, 0], (torch.arange(4, 28) + 0.5) / 32, atol=1e-5, rtol=0)


def test_what_is_hidden_behind_or_outside_is_not_read():
    view = cameras(1)
    depth = wall_depth(view[0])[None]
    points = torch.tensor(
        [
            [0.0, 0.0, 0.0],  # on the wall
            [0.0, 1.0, 0.0],  # behind the wall
            [0.0, -1.0, 0.0],  # in front of it: not what the picture shows
            [0.0, 0.04, 0.0],  # as good as on it
            [50.0, 0.0, 0.0],  # beside the picture
            [0.0, -9.0, 0.0],  # behind the camera
            [float("nan"), 0.0, 0.0],
        ]
    )
    maps = torch.ones(1, 2, 3, 4)
    assert lift_features(points, maps, view, depth).views.tolist() == [1, 0, 0, 1, 0, 0, 0]
    feats, seen = lift_features(points, maps, view)
    assert seen.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert feats[4:].eq(0).all()
    assert visible_in(points, view[0], torch.zeros(24, 32))[1].sum() == 0  # unknown depth
    assert visible_in(points, view[0], torch.full((24, 32), torch.inf))[1].sum() == 0
    small = torch.nn.functional.interpolate(depth[None], (6, 8), mode="area")[0]
    assert lift_features(points, maps, view, small, tolerance=0.1).views[0] == 1  # the depth image may have another size


def test_gradients_reach_the_maps():
    view = cameras(2)
    maps = torch.randn(2, 3, 6, 8, dtype=torch.float64, requires_grad=True)
    points = 0.3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda maps: lift_features(points, maps, view).feats, (maps,))


def test_nothing_to_read():
    view = cameras(2)
    feats, seen = lift_features(torch.zeros(0, 3), torch.ones(2, 4, 3, 4), view)
    assert feats.shape == (0, 4)
    assert seen.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(4, 2)}, r"points must be \[M, 3\], got \[4, 2\]"),
        ({"maps": torch.zeros(3, 4, 2, 2)}, "one camera for each of the V pictures"),
        ({"maps": torch.zeros(4, 2, 2)}, r"maps must be \[V, C, h, w\]"),
        ({"depth": torch.zeros(24, 32)}, r"depth must be \[2, H, W\]"),
    ],
)
def test_shapes_that_do_not_belong_together(change, message):
    given = {"points": torch.zeros(4, 3), "maps": torch.zeros(2, 4, 2, 2), "cameras": cameras(2), **change}
    with pytest.raises(ValueError, match=message):
        lift_features(**given)
