"""Projection of clouds to images and reading maps at points, against the published implementation and a plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_files import golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from geossl.geometry import PackedPoints
from geossl.layers.projection import VIEWS, ViewFrames, back_project, fit_views, project_views, splat_depth

BACKGROUND = [(0.5 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]


def golden_cases(needed: str) -> pytest.MarkDecorator:
    """Run a test on every golden file with this tensor."""
    paths = golden_files("i2p_mae", lambda metadata, names: needed in names)
    return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=pytest.mark.golden) for path in paths])


def plain_pixels(cloud: torch.Tensor, size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pixel of each point in each view and the depth sums, 25 painted pixels a point, one cloud: ``[N, 2]`` and ``[3, S, S]``."""
    pixels, images = [], []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        view = cloud[:, list(order)]
        plane, depth = view[:, :2].detach(), view[:, 2]
        low = plane.min(0).values
        cell = (plane.max(0).values - low).max() / (size - 3)
        index = ((plane - low) / (cell if cell > 0 else 1)).floor().long().clamp(max=size - 3)
        reach = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3))
        painted = index[:, None] + reach + 1
        center = (painted.amax((0, 1)) + painted.amin((0, 1))).div(2, rounding_mode="floor")
        shift = size // 2 - center - 1
        painted = painted + shift
        painted = painted + (painted < 0).long() - (painted > size - 1).long()
        flat = (painted[..., 0] * size + painted[..., 1]).flatten()
        image = cloud.new_zeros(size * size).scatter_add(0, flat, depth[:, None].expand(-1, 25).flatten())
        pixels.append(index + 1 + shift)
        images.append(image.view(size, size))
    return pixels, torch.stack(images)


def plain_back_project(maps: torch.Tensor, cloud: torch.Tensor, query: torch.Tensor, size: int) -> torch.Tensor:
    """Upsample the three maps ``[3, C, h, w]`` of one cloud whole; ``query`` numbers its points. ``[Q, 3, C]``."""
    pixels, _ = plain_pixels(cloud, size)
    large = F.interpolate(maps, (size, size), mode="bicubic", align_corners=False)
    return torch.stack([large[v][:, pixels[v][query, 0], pixels[v][query, 1]].T for v in range(3)], 1)


@golden_cases("view0.raw_sum")
def test_golden_projector(path):
    case = load_file(path)
    frames = fit_views(case["points"])
    depth = splat_depth(case["points"], frames)
    images = project_views(case["points"]).images
    maps = case["feature_map"].repeat(VIEWS, 1, 1, 1)
    values = back_project(maps, case["query_points"], frames)
    for v in range(VIEWS):
        assert torch.equal(frames.minimum[v], case[f"view{v}.pc_min"][0])
        assert torch.equal(frames.cell[v], case[f"view{v}.grid_size"].flatten())
        assert torch.equal(frames.shift[v], case[f"view{v}.offset_xy"].long())
        torch.testing.assert_close(depth[v], case[f"view{v}.raw_sum"][0], rtol=0, atol=1e-5)
        assert torch.equal(depth[v] == 0, case[f"view{v}.raw_sum"][0] == 0)
        torch.testing.assert_close(images[v, :, 112], case[f"view{v}.norm_rgb_row112"][0], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(images[v].sum((1, 2)), case[f"view{v}.norm_sum"][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(values[:, :, v], case[f"view{v}.backproj"], rtol=1e-4, atol=2e-5)


@golden_cases("out.images_stride8")
def test_golden_images_of_a_batch(path):
    case = load_file(path)
    images = project_views(case["points"]).images
    torch.testing.assert_close(images[:, 0, ::8, ::8], case["out.images_stride8"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(images.sum((1, 2, 3)), case["out.images_sum"], rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    count=st.integers(1, 60),
    size=st.sampled_from([8, 10, 32, 224]),
    flat=st.sampled_from([(), (0,), (0, 1), (0, 1, 2)]),
    scale=st.sampled_from([1e-20, 1.0, 1e10]),
    seed=st.integers(0, 100),
)
def test_equals_the_plain_form(batch, count, size, flat, scale, seed):
    """Also for planes, lines and single points, tiny and huge ones."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, count, 3, generator=generator, dtype=torch.float64) * scale
    points[..., list(flat)] = 0.25
    frames = fit_views(points, size)
    depth = splat_depth(points, frames).view(VIEWS, batch, size, size)
    maps = torch.randn(VIEWS * batch, 2, 3, 4, generator=generator, dtype=torch.float64)
    query = torch.randint(count, (5,), generator=generator)
    values = back_project(maps, points[:, query], frames)
    for b in range(batch):
        expected = plain_pixels(points[b], size)[1]
        torch.testing.assert_close(depth[:, b], expected, rtol=1e-10, atol=1e-12 * float(points[b].abs().max()))
        torch.testing.assert_close(values[b], plain_back_project(maps[b::batch], points[b], query, size), rtol=1e-9, atol=1e-9)


def test_a_cloud_does_not_depend_on_its_batch():
    points = torch.randn(3, 200, 3)
    together, alone = project_views(points), project_views(points[1:2])
    assert torch.equal(together.images[1::3], alone.images)
    maps = torch.randn(9, 4, 7, 7)
    assert torch.equal(back_project(maps, points, together.frames)[1:2], back_project(maps[1::3].contiguous(), points[1:2], alone.frames))


def test_packed_clouds_of_different_sizes_equal_the_clouds_one_by_one():
    lengths = [30, 1, 12]
    packed = PackedPoints(torch.randn(43, 3), torch.tensor([0, 30, 31, 43]))
    views = project_views(packed, 32)
    query = PackedPoints(packed.coord[[3, 4, 30, 40, 35]], torch.tensor([0, 2, 3, 5]))
    maps = torch.randn(9, 4, 5, 6)
    read = back_project(maps, query, views.frames)
    assert read.shape == (5, 3, 4)
    for i, (cloud, own) in enumerate(zip(packed.coord.split(lengths), query.coord.split([2, 1, 2]), strict=True)):
        alone = project_views(cloud[None], 32)
        assert torch.equal(alone.images, views.images[i::3])
        expected = back_project(maps[i::3], own[None], alone.frames)[0]
        torch.testing.assert_close(read.split([2, 1, 2])[i], expected)


def test_gradients():
    """Depth gets the gradient of the plain form; back-projection that of the maps."""
    points = torch.randn(2, 30, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VIEWS * 2, 32, 32, dtype=torch.float64)
    (fast,) = torch.autograd.grad((splat_depth(points, fit_views(points, 32)).sigmoid() * weight).sum(), points)
    plain = torch.stack([plain_pixels(cloud, 32)[1] for cloud in points], 1).flatten(0, 1)
    (expected,) = torch.autograd.grad((plain.sigmoid() * weight).sum(), points)
    torch.testing.assert_close(fast, expected)
    assert project_views(points, 32).images.requires_grad

    maps = torch.randn(VIEWS * 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    frames = fit_views(points, 32)
    assert torch.autograd.gradcheck(lambda m: back_project(m, points.detach()[:, :4], frames), maps)


def test_a_single_point_is_a_square_in_the_middle():
    views = project_views(torch.tensor([[[0.0, 0.0, 3.0]]]))
    assert torch.equal(views.frames.cell, torch.ones(3, 1))
    front = views.images[0]
    painted = (front[0] != front[0, 0, 0]).nonzero()
    assert painted.amin(0).tolist() == [109, 109]  # the middle of 224 as the published centring has it
    assert painted.amax(0).tolist() == [113, 113]
    expected = [(torch.tensor(3.0).sigmoid().item() - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(front[:, 111, 111], torch.tensor(expected))


def test_a_plane_seen_at_depth_zero_leaves_the_background():
    """The view along the normal of z = 0 sees no depth at all: a constant image, finite values."""
    points = torch.cat([torch.rand(1, 50, 2), torch.zeros(1, 50, 1)], 2)
    images = project_views(points).images
    torch.testing.assert_close(images[0], torch.tensor(BACKGROUND)[:, None, None].expand(3, 224, 224))
    assert images.isfinite().all()


def test_points_outside_read_the_nearest_pixel_of_the_frame():
    points = torch.rand(1, 50, 3)
    points[0, :2] = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    frames = fit_views(points, 32)
    maps = torch.rand(3, 2, 4, 4)
    far = torch.tensor([[[-1e30, -1e30, -1e30], [1e30, 1e30, 1e30]]])
    assert torch.equal(back_project(maps, far, frames), back_project(maps, points[:, :2], frames))


def test_empty_batches_and_queries():
    points = torch.zeros(0, 5, 3)
    views = project_views(points)
    assert views.images.shape == (0, 3, 224, 224)
    frames = fit_views(torch.rand(2, 5, 3))
    assert back_project(torch.rand(6, 4, 2, 2), torch.zeros(2, 0, 3), frames).shape == (2, 0, 3, 4)


def test_half_precision_maps_give_the_type_of_the_points():
    points = torch.rand(1, 9, 3)
    maps = torch.rand(3, 2, 4, 4).half()
    frames = fit_views(points)
    assert torch.equal(back_project(maps, points, frames), back_project(maps.float(), points, frames))


FRAMES = fit_views(torch.rand(2, 5, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_views(torch.rand(5, 3)), ValueError, r"must be \[B, N, 3\], got \[5, 3\]; a single cloud needs points\[None\]"),
        (lambda: fit_views(torch.rand(2, 5, 3).half()), TypeError, "float32 or float64 tensor, got torch.float16"),
        (lambda: fit_views([[0.0]]), TypeError, "got <class 'list'>"),
        (lambda: project_views(torch.zeros(2, 0, 3)), ValueError, "needs at least one point"),
        (lambda: project_views(torch.rand(2, 5, 3), 225), ValueError, "even whole number of at least 8 pixels, got 225"),
        (lambda: project_views(torch.tensor([[[0.0, 0, 0]], [[0, torch.nan, 0]]])), ValueError, r"clouds \[1\] hold NaN"),
        (lambda: project_views(torch.tensor([[[0.0, 0, 0], [0, torch.inf, 0]]])), ValueError, r"clouds \[0\] hold NaN, infinite"),
        (lambda: project_views(torch.tensor([[[-3e38, 0, 0], [3e38, 0, 0]]])), ValueError, "overflowing"),
        (lambda: splat_depth(torch.rand(3, 5, 3), FRAMES), ValueError, "frames are of 2 clouds, the points of 3"),
        (lambda: splat_depth(torch.rand(2, 5, 3).double(), FRAMES), TypeError, "fitted to torch.float32"),
        (lambda: back_project(torch.rand(6, 4, 2, 2), torch.full((2, 1, 3), torch.nan), FRAMES), ValueError, r"clouds \[0, 1\] hold NaN"),
        (lambda: back_project(torch.rand(2, 4, 2, 2), torch.rand(2, 5, 3), FRAMES), ValueError, r"maps must be \[6, C, h, w\]"),
        (lambda: back_project(torch.rand(6, 4, 0, 2), torch.rand(2, 5, 3), FRAMES), ValueError, r"got \[6, 4, 0, 2\]"),
        (lambda: back_project(torch.ones(6, 4, 2, 2).long(), torch.rand(2, 5, 3), FRAMES), TypeError, "floating-point tensor"),
    ],
)
def test_bad_input(call, error, message):
    assert isinstance(FRAMES, ViewFrames)
    with pytest.raises(error, match=message):
        call()
