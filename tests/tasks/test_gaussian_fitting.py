from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import geossl
from geossl.data import SceneSample
from geossl.errors import CheckpointError, ConfigError, DataError
from geossl.geometry import intrinsics_from_fov, look_at, project
from geossl.ops import rasterize_gaussians
from geossl.tasks import DensityConfig, GaussianFit, GaussianFitConfig, StartConfig, fit_gaussians
from geossl.tasks.gaussian_density import GaussianRows, densify
from geossl.tasks.gaussian_fitting import to_gaussians, to_parameters
from geossl.tasks.gaussian_start import first_gaussians, seen_by, split_views, start_at_random, thin

SIZE, VIEWS = 32, 16


def ring(count: int) -> torch.Tensor:
    """Poses of cameras on a ring around the middle, looking at it."""
    angle = torch.arange(count) / count * 2 * math.pi
    return look_at(torch.stack([3 * angle.cos(), 3 * angle.sin(), 1 + 0.3 * (3 * angle).cos()], 1), torch.zeros(3).expand(count, 3))


@pytest.fixture(scope="module")
def scene() -> SceneSample:
    """Images with depth of 150 opaque coloured Gaussians."""
    rng = torch.Generator().manual_seed(5)
    means = torch.rand(150, 3, generator=rng) * 1.6 - 0.8
    quats, scales = torch.randn(150, 4, generator=rng), 0.06 + 0.1 * torch.rand(150, 3, generator=rng)
    colors, opacities = torch.rand(150, 3, generator=rng), torch.full((150,), 0.95)
    pose, k = ring(VIEWS), intrinsics_from_fov(50.0, SIZE, SIZE).expand(VIEWS, 3, 3)
    image, alpha, _ = rasterize_gaussians(means, quats, scales, opacities, colors, pose, k, SIZE, SIZE, render_mode="RGB+ED")
    depth = torch.where(alpha[..., 0] > 0.7, image[..., 3], 0.0)
    return SceneSample(image[..., :3].movedim(-1, 1).clamp(0, 1), k.clone(), pose, depth=depth, source="ring")


QUICK = GaussianFitConfig(
    steps=40,
    sh_every=15,
    background=(0.0, 0.0, 0.0),
    start=StartConfig(count=300),
    density=DensityConfig(every=10, begin=0.2, end=0.5, gradient=1e-3),
)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def test_a_fit_from_depth_beats_a_number_and_its_start(scene):
    losses = []
    result = geossl.fit_gaussians(scene, QUICK, steps=150, progress=lambda fit, loss: losses.append((fit.step, loss)))
    assert result.held_out == (4, 12)
    assert result.psnr > 20
    assert result.psnr > result.psnr_start + 6
    assert result.ssim > result.ssim_start + 0.3
    assert len(result.gaussians) > 300  # densified
    assert result.gaussians.sh_degree == 1
    assert not result.gaussians.means.requires_grad
    assert [step for step, _ in losses] == list(range(1, 151))
    assert [loss for _, loss in losses] == list(result.losses)
    assert sum(result.losses[-20:]) < 0.5 * sum(result.losses[:20])


def test_a_fit_from_random_points_improves(scene):
    blind = dataclasses.replace(scene, depth=None)
    result = fit_gaussians(blind, QUICK, steps=150)
    assert result.psnr > result.psnr_start + 2
    assert result.psnr > 15


@pytest.mark.parametrize(
    "changes",
    [
        {"ssim_weight": 0.0, "sh_degree": 0},
        {"antialiased": True, "sh_degree": 3, "sh_every": 4},
        {"views_per_step": 3, "background": (1.0, 0.5, 0.0)},
        {"density": DensityConfig(every=5, begin=0, absgrad=True, gradient=1e-4, reset_every=8)},
        {"density": DensityConfig(every=0)},
        {"test_every": 0},
    ],
)
def test_options_run_and_lower_the_loss(scene, changes):
    result = fit_gaussians(scene, QUICK, **{"steps": 24, **changes})
    if changes.get("density", QUICK.density).reset_every != 8:  # right after its opacities were lowered, a scene is dark
        assert sum(result.losses[-6:]) < sum(result.losses[:6])
    assert all(torch.isfinite(value).all() for value in vars(result.gaussians).values())
    assert math.isnan(result.psnr) == (result.held_out == ())


def test_the_same_bits_again_and_other_bits_with_another_seed(scene):
    first, again, other = (fit_gaussians(scene, QUICK, seed=seed) for seed in (0, 0, 1))
    assert equal(vars(first.gaussians), vars(again.gaussians))
    assert first.losses == again.losses
    assert first.losses != other.losses


def test_any_number_of_threads_gives_the_same_bits(scene):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fit_gaussians(scene, QUICK, steps=15))
    finally:
        torch.set_num_threads(before)
    assert results[0].losses == results[1].losses
    assert equal(vars(results[0].gaussians), vars(results[1].gaussians))


@pytest.mark.parametrize("stop", [7, 10, 25])
def test_a_resumed_fit_equals_one_never_stopped(scene, stop):
    whole, part, rest = (GaussianFit(scene, QUICK) for _ in range(3))
    while part.step < stop:
        part.train_step()
    saved = {name: value.clone() for name, value in part.state_dict().items()}
    part.train_step()  # goes on, which must not change what was saved
    rest.load_state_dict(saved)
    assert rest.step == stop
    for fit in (whole, rest):
        while fit.step < QUICK.steps:
            fit.train_step()
    assert equal(whole.state_dict(), rest.state_dict())
    assert len(whole.rows) != len(GaussianFit(scene, QUICK).rows)


def test_held_out_views_teach_nothing(scene):
    image, depth = scene.image.clone(), scene.depth.clone()
    image[4], depth[4] = torch.rand(3, SIZE, SIZE), 1.0
    plain, disturbed = fit_gaussians(scene, QUICK), fit_gaussians(dataclasses.replace(scene, image=image, depth=depth), QUICK)
    assert plain.losses == disturbed.losses
    assert plain.psnr != disturbed.psnr


def test_nothing_is_the_mean_colour_of_the_views_learned_from(scene):
    fit = GaussianFit(scene, dataclasses.replace(QUICK, background=None))
    train = [row for row in range(VIEWS) if row not in (4, 12)]
    torch.testing.assert_close(fit.background, scene.image[train].mean((0, 2, 3)))
    with torch.no_grad():
        fit.rows.values["opacities"][:] = -20
    assert torch.allclose(fit.render([0, 4]), fit.background.expand(2, SIZE, SIZE, 3))
    assert GaussianFit(scene, dataclasses.replace(QUICK, background=(0.0, 0.5, 1.0))).background.tolist() == [0.0, 0.5, 1.0]


def test_every_view_comes_once_before_any_comes_again(scene):
    fit = GaussianFit(scene, dataclasses.replace(QUICK, views_per_step=3))
    seen = []
    for fit.step in range(14):
        seen += fit.next_views().tolist()
    epochs = [seen[i : i + 14] for i in range(0, 42, 14)]
    assert all(sorted(epoch) == [row for row in range(16) if row not in (4, 12)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_degrees_are_raised_in_steps(scene):
    fit = GaussianFit(scene, dataclasses.replace(QUICK, sh_degree=2, sh_every=15, density=DensityConfig(every=0)))
    for fit.step, degree in ((0, 0), (14, 0), (15, 1), (30, 2), (39, 2)):
        assert fit.sh_degree == degree
    fit.step = 0
    fit.train_step()
    assert not fit.rows.values["sh_rest"].any()
    fit.step = 15
    fit.train_step()
    assert fit.rows.values["sh_rest"][:, :3].any()
    assert not fit.rows.values["sh_rest"][:, 3:].any()


def test_a_data_set_and_a_row(scene):
    class Scenes:
        def __len__(self):
            return 2

        def __getitem__(self, row):
            return scene if row == 1 else dataclasses.replace(scene, image=scene.image[:2])

    assert fit_gaussians(Scenes(), QUICK, row=1, steps=2).losses == fit_gaussians(scene, QUICK, steps=2).losses
    with pytest.raises(DataError, match=r"row 2 is outside 0..1"):
        fit_gaussians(Scenes(), QUICK, row=2)


# ---------------------------------------------------------------------------------------------------------------------
# Where it starts


@pytest.mark.parametrize(("count", "every"), [(30, 8), (9, 8), (3, 8), (5, 2), (100, 10)])
def test_split_of_views(count, every):
    train, held_out = split_views(count, every)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(count))
    assert 1 <= len(held_out) <= -(-count // every)
    assert len(train) >= 2
    assert 0 not in held_out
    assert len(split_views(count, 0)[1]) == 0


def test_points_are_thinned_to_a_count():
    points, colors = torch.rand(5000, 3), torch.rand(5000, 3)
    for count in (4000, 700, 1):
        kept, color = thin(points, colors, count, 1e-4)
        assert 0.6 * count <= len(kept) <= count
        assert len(color) == len(kept)
        assert (kept.amin(0) >= points.amin(0)).all()
    assert torch.equal(thin(points, colors, 9000, 1e-6)[0].sort(0).values, points.sort(0).values)


def test_random_points_lie_where_views_meet(scene):
    fit = GaussianFit(scene, QUICK)
    points, colors = start_at_random(fit.views, 500, torch.Generator().manual_seed(0))
    assert len(points) == 500
    assert (seen_by(points, fit.views.cameras) >= 3).all()
    assert colors.min() >= 0
    # Each has the colour of a pixel on its ray: the nearest of all views is exact.
    pixels, _ = project(points.expand(VIEWS, -1, -1), scene.world_to_cam, scene.intrinsics)
    row, column = (pixels[..., axis].floor().long().clamp(0, SIZE - 1) for axis in (1, 0))
    found = fit.views.image[torch.arange(VIEWS)[:, None], row, column]
    assert ((found - colors).abs().amax(-1).amin(0) < 1e-6).float().mean() > 0.99


def test_first_gaussians_are_as_large_as_their_neighbours_are_far():
    grid = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"), -1).flatten(0, 2)
    made = first_gaussians(0.5 * grid, torch.full_like(grid, 0.25), 0.3, 2.0, 2)
    assert torch.allclose(made.scales, torch.ones(64, 3))
    assert torch.allclose(made.colors, torch.full_like(grid, 0.25))
    assert made.sh.shape == (64, 9, 3)
    alone = first_gaussians(torch.zeros(1, 3), torch.zeros(1, 3), 0.3, 1.0, 0)
    assert (alone.scales > 0).all()
    assert (first_gaussians(torch.zeros(5, 3), torch.zeros(5, 3), 0.3, 1.0, 0).scales > 0).all()


def test_points_of_a_scene_are_a_start(scene):
    points = torch.cat([torch.rand(400, 3) - 0.5, torch.tensor([[0.0, 0.0, 90.0]])])  # the last is seen by none
    given = dataclasses.replace(scene, depth=None, points=points, colors=torch.rand(401, 3))
    fit = GaussianFit(given, QUICK)
    assert 150 < len(fit.rows) <= 300
    assert fit.gaussians.means.abs().max() < 1
    assert torch.allclose(fit.gaussians.opacities, torch.tensor(0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Adding and removing


def rows_of(count: int) -> GaussianRows:
    """Rows with moments that tell them apart."""
    points = torch.rand(count, 3)
    values = to_parameters(first_gaussians(points, torch.rand(count, 3), 0.5, 1.0, 1))
    rows = GaussianRows(values, dict.fromkeys(values, 1e-2))
    for _ in range(3):
        for value in rows.values.values():
            value.grad = torch.randn_like(value)
        rows.adam_step(dict.fromkeys(values, 1e-2))
    return rows


def test_rows_take_their_moments_with_them():
    rows = rows_of(10)
    before = {name: value.clone() for name, value in rows.state_dict().items()}
    kept = torch.tensor([True] * 4 + [False] * 6)
    rows.change(kept, {name: value[8:].detach() for name, value in rows.values.items()})
    after = rows.state_dict()
    for name in rows.values:
        assert torch.equal(after[name], before[name][[0, 1, 2, 3, 8, 9]])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after[f"{name}.{key}"][:4], before[f"{name}.{key}"][:4])
            assert before[f"{name}.{key}"].any()
            assert not after[f"{name}.{key}"][4:].any()
        assert after[f"{name}.step"] == 3
    assert len(rows) == len(rows.gradient) == len(rows.seen) == 6
    rows.values["means"].grad = torch.ones(6, 3)
    was = rows.values["means"].detach().clone()
    rows.adam_step(dict.fromkeys(rows.values, 0.5))
    assert not torch.equal(rows.values["means"], was)  # the optimiser knows the new parameters


def test_adam_is_that_of_torch():
    rows = rows_of(7)
    twin = {name: value.detach().clone().requires_grad_() for name, value in rows.values.items()}
    rows = GaussianRows(twin, dict.fromkeys(twin, 1e-2))
    optimizer = torch.optim.Adam(twin.values(), lr=1e-2, eps=1e-15)
    for _ in range(4):
        for name, value in rows.values.items():
            value.grad = torch.randn_like(value)
            twin[name].grad = value.grad.clone()
        rows.adam_step(dict.fromkeys(twin, 1e-2))
        optimizer.step()
    for name, value in rows.values.items():
        torch.testing.assert_close(value.detach(), twin[name].detach())


def test_clone_split_and_prune():
    rows = rows_of(6)
    with torch.no_grad():
        rows.values["scales"][:] = math.log(0.1)
        rows.values["scales"][[1, 3]] = math.log(0.4)
        rows.values["opacities"][5] = -9
        rows.values["opacities"][:5] = 0
    was = to_gaussians({name: value.detach().clone() for name, value in rows.values.items()})
    rows.gradient[:], rows.seen[:] = torch.tensor([0.0, 9, 9, 0, 0, 9]), 2
    config = DensityConfig(every=10, begin=0, gradient=1.0, split_size=0.2, max_size=9)
    densify(rows, config, 9, 100, 1.0, 99, torch.Generator())
    assert len(rows) == 6  # it is not time
    densify(rows, config, 10, 100, 1.0, 99, torch.Generator().manual_seed(0))
    now = to_gaussians(rows.values)
    # 1 is split and gone, 5 is faint and gone whatever its gradient; then the clone of 2 and the two parts of 1.
    assert torch.equal(now.means[:5], was.means[[0, 2, 3, 4, 2]])
    assert torch.equal(now.quats[5:], was.quats[[1, 1]])
    assert torch.allclose(now.scales[5:], torch.tensor(0.4 / 1.6))
    assert ((now.means[5:] - was.means[1]).abs() < 0.4 * 5).all()
    assert not torch.equal(now.means[5], now.means[6])
    assert not rows.gradient.any()


def test_the_parts_of_a_split_are_spread_as_it_was():
    rows = rows_of(4000)
    turn = torch.tensor([math.cos(0.3), 0.0, 0.0, math.sin(0.3)])  # by 0.6 about z
    with torch.no_grad():
        rows.values["means"][:], rows.values["quats"][:] = 0, 2 * turn
        rows.values["scales"][:] = torch.tensor([0.9, 0.3, 0.1]).log()
    rows.gradient[:], rows.seen[:] = 9, 1
    densify(rows, DensityConfig(every=1, begin=0, max_size=9), 1, 100, 1.0, 8000, torch.Generator().manual_seed(0))
    means = rows.values["means"].detach()
    assert len(means) == 8000
    axis = torch.tensor([math.cos(0.6), math.sin(0.6), 0.0])
    assert float((means @ axis).std()) == pytest.approx(0.9, rel=0.05)
    assert float(means[:, 2].std()) == pytest.approx(0.1, rel=0.05)


def test_no_more_than_the_cap_and_the_most_wanted_first():
    rows = rows_of(8)
    was = rows.values["means"].detach().clone()
    rows.gradient[:], rows.seen[:] = torch.arange(8.0), 1
    densify(rows, DensityConfig(every=1, begin=0, gradient=0.5, split_size=99, max_size=99), 1, 9, 1.0, 10, torch.Generator())
    assert len(rows) == 10
    assert sorted(rows.values["means"][8:].tolist()) == sorted(was[[6, 7]].tolist())
    densify(rows, DensityConfig(every=1, begin=0, gradient=0.5, max_size=99), 1, 9, 1.0, 3, torch.Generator())
    assert len(rows) == 10  # a cap adds none, it removes none


@pytest.mark.parametrize(("cap", "most"), [(None, 14 * SIZE * SIZE // 4), (310, 310)])
def test_the_cap_of_a_fit(scene, cap, most):
    density = DensityConfig(every=4, begin=0, end=1, gradient=1e-9, max_count=cap)
    fit = GaussianFit(scene, dataclasses.replace(QUICK, steps=24, density=density))
    while fit.step < 24:
        fit.train_step()
    assert 0.9 * most < len(fit.rows) <= most


def test_opacities_are_reset_and_some_gaussian_is_always_left():
    rows = rows_of(5)
    config = DensityConfig(every=2, begin=0, reset_every=3, max_size=99)
    densify(rows, config, 3, 99, 1.0, 99, torch.Generator())
    assert float(rows.values["opacities"].detach().sigmoid().max()) <= 0.01 + 1e-6
    assert not rows.state_dict()["opacities.exp_avg"].any()
    assert rows.state_dict()["means.exp_avg"].any()
    with torch.no_grad():
        rows.values["opacities"][:] = -20
    densify(rows, config, 4, 99, 1.0, 99, torch.Generator())
    assert len(rows) == 5


def test_gradients_do_not_depend_on_views_per_step(scene):
    """What is gathered is that of single views, added up."""
    config = dataclasses.replace(QUICK, test_every=0, ssim_weight=0.0, density=DensityConfig(every=100, end=1.0))
    fits = []
    for batch in (1, 4):
        fit = GaussianFit(scene, dataclasses.replace(config, views_per_step=batch))
        fit._rates = dict.fromkeys(fit._rates, 0.0)
        for _ in range(len(fit.views) // batch):
            fit.train_step()
        fits.append(fit)
    torch.testing.assert_close(fits[0].rows.gradient, fits[1].rows.gradient)
    assert torch.equal(fits[0].rows.seen, fits[1].rows.seen)
    assert fits[0].rows.seen.max() == 16


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def _with(**changes):
    return lambda scene: dataclasses.replace(scene, **{name: change(scene) for name, change in changes.items()})


def _spoilt(name, row, value):
    def spoil(scene):
        changed = getattr(scene, name).clone()
        changed[row] = value
        return dataclasses.replace(scene, **{name: changed})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_with(image=lambda s: s.image[:0]), "needs at least 3 views"),
        (_with(image=lambda s: s.image[:1]), "needs at least 3 views.*got 1"),
        (_with(image=lambda s: s.image[:, 0]), r"image must be \[V, 3, H, W\], got \[16, 32, 32\]"),
        (_with(image=lambda s: (s.image * 255).byte()), "image must be a floating tensor.*uint8; divide by 255"),
        (_with(image=lambda s: s.image * 255), "image must lie in 0..1"),
        (_with(image=lambda s: s.image[..., :5]), "at least 8 x 8 pixels, got 32 x 5"),
        (_spoilt("image", 3, math.nan), "image of view 3 is not finite"),
        (_with(world_to_cam=lambda s: None), "has no world_to_cam"),
        (_with(world_to_cam=lambda s: s.world_to_cam[:5]), r"world_to_cam must be \[V, 4, 4\] with V = 16, got \[5, 4, 4\]"),
        (_spoilt("world_to_cam", 2, math.inf), "world_to_cam of view 2 is not finite"),
        (_with(world_to_cam=lambda s: 2 * s.world_to_cam), "world_to_cam of view 0 is no rotation"),
        (_with(intrinsics=lambda s: s.intrinsics[0]), r"intrinsics must be \[V, 3, 3\]"),
        (_with(intrinsics=lambda s: -s.intrinsics), "positive focal lengths"),
        (_with(depth=lambda s: s.depth[:, :9]), "depth must be"),
        (_with(valid=lambda s: torch.ones(2, 2)), "valid must be bool"),
        (lambda s: SimpleNamespace(image=s.image), "fit_gaussians: has no intrinsics"),
        (_with(depth=lambda s: None, points=lambda s: torch.rand(5, 3) + 50), "none of its 5 points is seen by any view"),
        (_with(depth=lambda s: None, points=lambda s: torch.rand(5)), r"points must be \[N, 3\]"),
    ],
)
def test_bad_scenes_are_refused_before_any_work(scene, spoil, message, monkeypatch):
    monkeypatch.setattr(GaussianFit, "train_step", lambda self: pytest.fail("work has begun"))
    with pytest.raises(DataError, match=message):
        fit_gaussians(spoil(scene), QUICK)


def test_all_points_behind_the_cameras_is_said(scene):
    behind = -3 * scene.world_to_cam[:2, 2, :3] * torch.tensor([1.0, 1, 0])
    one_side = dataclasses.replace(
        scene, image=scene.image[:3], intrinsics=scene.intrinsics[:3], world_to_cam=scene.world_to_cam[:1].repeat(3, 1, 1), depth=None,
        points=(behind[:1] * 0 - 9 * scene.world_to_cam[0, 2, :3]),
    )  # fmt: skip
    with pytest.raises(DataError, match="they all lie behind the cameras"):
        fit_gaussians(one_side, QUICK)


def test_two_views_suffice_when_none_is_held_out(scene):
    two = dataclasses.replace(scene, **{n: getattr(scene, n)[:2] for n in ("image", "intrinsics", "world_to_cam", "depth")})
    assert len(fit_gaussians(two, QUICK, steps=2, test_every=0).losses) == 2
    with pytest.raises(DataError, match="at least 3 views"):
        fit_gaussians(two, QUICK)


def test_depth_that_is_not_known_is_not_used(scene):
    unknown = dataclasses.replace(scene, depth=torch.full_like(scene.depth, math.nan))
    assert len(GaussianFit(unknown, QUICK).rows) == 300  # at random instead
    with pytest.raises(DataError, match=r"start\.source is 'depth'"):
        GaussianFit(unknown, dataclasses.replace(QUICK, start=StartConfig(source="depth")))
    with pytest.raises(DataError, match=r"start\.source is 'points'"):
        GaussianFit(scene, dataclasses.replace(QUICK, start=StartConfig(source="points")))
    mask = torch.zeros_like(scene.depth, dtype=torch.bool)
    mask[:, 14:18] = True
    many = dataclasses.replace(QUICK, start=StartConfig(count=9000))
    masked, whole = GaussianFit(dataclasses.replace(scene, valid=mask), many), GaussianFit(scene, many)
    assert 20 < len(masked.rows) < 0.5 * len(whole.rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianFitConfig(steps=0), "steps must be at least 1"),
        (lambda: GaussianFitConfig(test_every=1), "test_every must be 0 or at least 2"),
        (lambda: GaussianFitConfig(sh_degree=4), "sh_degree must lie in 0..3"),
        (lambda: GaussianFitConfig(ssim_weight=1.5), "ssim_weight"),
        (lambda: GaussianFitConfig(background=(0.0, 2.0, 0.0)), "background"),
        (lambda: DensityConfig(begin=0.6, end=0.5), "end must lie in"),
        (lambda: StartConfig(opacity=1.0), "opacity must lie between 0 and 1"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_unknown_settings_and_states_are_refused(scene):
    with pytest.raises(ConfigError, match="unknown settings step; known are steps"):
        fit_gaussians(scene, step=5)
    fit = GaussianFit(scene, QUICK)
    with pytest.raises(CheckpointError, match="of step None"):
        fit.load_state_dict({})
    other = GaussianFit(scene, dataclasses.replace(QUICK, sh_degree=2))
    with pytest.raises(CheckpointError, match="another configuration; sh_rest"):
        fit.load_state_dict(other.state_dict())
    other.step = 41
    with pytest.raises(CheckpointError, match="of step 41, this fit ends at 40"):
        fit.load_state_dict(other.state_dict())


def test_a_loss_that_is_not_finite_stops_the_fit(scene):
    fit = GaussianFit(scene, QUICK)
    fit._images = torch.full_like(fit._images, math.nan)
    with pytest.raises(DataError, match="the loss of step 1 is not finite; lower the learning rates"):
        fit.train_step()
