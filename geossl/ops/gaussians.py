"""Gaussian splatting: a differentiable rasterizer with the arguments of gsplat."""

from __future__ import annotations

import importlib.util
import numbers
from typing import Any, Literal

import torch
from torch import Tensor

from geossl.errors import optional_import, unknown_name
from geossl.geometry.spherical_harmonics import spherical_harmonics
from geossl.ops import _checks, _dispatch, _native
from geossl.ops import _gaussians as native
from geossl.ops.reference import gaussians as reference

RenderMode = Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"]
RasterizeMode = Literal["classic", "antialiased"]
Backend = Literal["auto", "native", "reference", "gsplat"]

_OP = "rasterize_gaussians"
_RENDER_MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
_RASTERIZE_MODES = ("classic", "antialiased")
_BACKENDS = ("auto", "native", "reference", "gsplat")
_LARGEST_SIZE = 2**23  # pixel centres up to there are exact in float32


def rasterize_gaussians(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    *,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    render_mode: RenderMode = "RGB",
    absgrad: bool = False,
    rasterize_mode: RasterizeMode = "classic",
    covars: Tensor | None = None,
    with_ids: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render Gaussians to images by splatting them front to back (Kerbl et al. 2023), with gsplat's arguments and conventions.

    Gaussian splats are sorted by depth once per camera, equal depths in index order, and blended per pixel:
    ``alpha = min(0.999, opacity * exp(-sigma))``, skipped under 1/255, until the transmittance would fall to 1e-4 or less. On the CPU the
    image and all gradients are the same bits for any number of threads and any vector unit of the processor. With ``sh_degree`` the
    gradients of means, colors and viewmats include sums by torch, which are equal on x86 but not promised elsewhere. The CUDA kernels use
    no atomics either.

    A Gaussian with a number that is not finite (its colours too), with the quaternion 0 or with a negative scale is not drawn and gets no
    gradient, and so is one behind ``near_plane``, beyond ``far_plane``, off the image, or fainter than 1/255.

    Args:
        means: Centres, ``[..., N, 3]``, float32 or float64 (half types are upcast).
        quats: Rotations wxyz of any length, ``[..., N, 4]``; None with ``covars``.
        scales: Standard deviations along the axes (not their logarithms), ``[..., N, 3]``; None with ``covars``.
        opacities: In [0, 1] (not logits), ``[..., N]``.
        colors: Any number of feature channels, ``[..., N, D]``, or per camera ``[..., C, N, D]``. With ``sh_degree``, coefficients of
            spherical harmonics ``[..., N, K, 3]`` or ``[..., C, N, K, 3]``; the colour is then ``max(0, 0.5 + sum)``.
        viewmats: World to camera (x right, y down, z forward), ``[..., C, 4, 4]``.
        Ks: Intrinsics in pixels, ``[..., C, 3, 3]``; pixel centres lie at +0.5, and there is no skew.
        width: Of the images, 1 to 2**23.
        height: Of the images, 1 to 2**23.
        near_plane: Smallest depth drawn.
        far_plane: Largest depth drawn.
        radius_clip: Gaussians whose radii do not exceed it (pixels) are not drawn.
        eps2d: Blur in squared pixels added to the variances in the image.
        sh_degree: None, or the degree 0 to 3 of the spherical harmonics in ``colors``.
        backgrounds: Colour behind everything, ``[..., C, D]``; None is 0. Never behind depth.
        render_mode: "RGB" (the features), "D" (depth z, accumulated), "ED" (divided by alpha), or both, depth last.
        absgrad: Leave the sums of absolute gradients, as densification wants them, in ``meta["means2d"].absgrad`` after the backward pass.
        rasterize_mode: "antialiased" lowers opacities to make up for the blur ``eps2d``.
        covars: Covariances ``[..., N, 3, 3]`` (symmetric) instead of ``quats`` and ``scales``.
        with_ids: Add ``largest_id`` and ``largest_weight`` to ``meta``.
        backend: "native" (C++ on the CPU in float32 and float64, CUDA in float32), "reference" (plain torch, differentiable any number of
            times, slow), "gsplat" (that package, on a GPU), or "auto": the first of native, gsplat and reference that can serve.

    Returns:
        ``render [..., C, H, W, X]``, ``alpha [..., C, H, W, 1]`` and ``meta``, a dict with keys of gsplat: ``means2d [..., C, N, 2]``
        (call ``retain_grad`` on it for densification), ``depths [..., C, N]``, ``conics [..., C, N, 3]``, ``opacities [..., C, N]``,
        ``radii [..., C, N, 2]`` int32 (0: not drawn), ``tiles_per_gauss``, ``flatten_ids``, ``isect_offsets [..., C, th, tw]``,
        ``tile_size``, ``tile_width``, ``tile_height``, ``width``, ``height``, ``n_batches``, ``n_cameras`` (but not ``isect_ids``, the
        sort keys, which the CPU does not make). With ``with_ids`` also
        ``largest_id [..., C, H, W]`` int32, the Gaussian that gives a pixel the most of its colour (the first of equal ones, -1 for none),
        and its weight ``largest_weight [..., C, H, W]``.

        Differentiable once in means, quats, scales, covars, opacities, colors, viewmats and backgrounds (the reference: any number of
        times). Not in Ks, nor through the choice and order of Gaussians.

    Raises:
        ValueError: a shape, device or value is wrong; TypeError: a type is. Values on CUDA are only checked with ``GEOSSL_CHECKS=1``.

    Example:
        >>> view = torch.eye(4)[None]
        >>> lens = torch.tensor([[[9.0, 0, 4], [0, 9, 4], [0, 0, 1]]])
        >>> mean, quat, scale = torch.tensor([[0.0, 0, 2]]), torch.eye(4)[:1], torch.full((1, 3), 0.1)
        >>> render, alpha, meta = rasterize_gaussians(mean, quat, scale, torch.ones(1), torch.ones(1, 3), view, lens, 8, 8)
        >>> render.shape, alpha.shape
        (torch.Size([1, 8, 8, 3]), torch.Size([1, 8, 8, 1]))
    """
    for kind, chosen, known in (
        ("render_mode", str(render_mode), _RENDER_MODES),
        ("rasterize_mode", str(rasterize_mode), _RASTERIZE_MODES),
        ("backend", str(backend), _BACKENDS),
    ):
        if chosen not in known:
            raise unknown_name(f"{_OP} {kind}", chosen, known)
    width, height = _size("width", width), _size("height", height)
    options = {"near_plane": near_plane, "far_plane": far_plane, "radius_clip": radius_clip, "eps2d": eps2d}
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{_OP}: {name} must be a number, got {_checks.describe(value)}")
        if not value >= 0:
            raise ValueError(f"{_OP}: {name} must be a number of at least 0, got {value!r}")
    scene = _Scene(means, quats, scales, opacities, colors, viewmats, Ks, sh_degree, backgrounds, covars, render_mode)
    run = _choose(backend, scene.means)
    if run == "gsplat":
        if covars is not None or with_ids:
            raise ValueError(f"{_OP}: backend 'gsplat' has no {'covars' if covars is not None else 'with_ids'} here; use 'native'")
        return _gsplat(scene, width, height, options, render_mode, absgrad, rasterize_mode)
    antialiased = rasterize_mode == "antialiased"
    pipeline = _REFERENCE if run == "reference" else native.PIPELINE
    means2d, depths, conics, opacity, radii, tiles = pipeline.project(
        scene.means, scene.quats, scene.scales, scene.covars, scene.opacities, scene.viewmats, scene.Ks, width, height,
        float(near_plane), float(far_plane), float(radius_clip), float(eps2d), antialiased,
    )  # fmt: skip
    # The tensors in meta are those that the images are made from, so that their gradients can be asked for.
    means2d, depths, conics, opacity = (scene.unflatten(t) for t in (means2d, depths, conics, opacity))
    flat = [scene.flatten(t) for t in (means2d, conics, opacity, depths)]
    with torch.no_grad():
        ids, places, tile_starts, starts = pipeline.bin_tiles(*flat, radii, tiles, width, height)
    probe = torch.zeros_like(means2d, requires_grad=True) if absgrad and means2d.requires_grad and torch.is_grad_enabled() else None
    if probe is not None:
        if run == "reference":
            raise ValueError(f"{_OP}: backend 'reference' has no absgrad; use 'native'")
        probe.register_hook(lambda grad: setattr(means2d, "absgrad", grad))
    render, alpha, largest, weight = pipeline.composite(
        *flat[:3], scene.features(), flat[3] if "D" in render_mode else None, scene.backgrounds,
        None if probe is None else scene.flatten(probe), ids, places, tile_starts, starts, width, height, with_ids,
    )  # fmt: skip
    if "ED" in render_mode:
        depth = render[..., -1:] / alpha[..., None].clamp(min=1e-10)
        render = depth if render.shape[-1] == 1 else torch.cat([render[..., :-1], depth], -1)
    across, down = -(-width // reference.TILE), -(-height // reference.TILE)
    meta: dict[str, Any] = {
        "batch_ids": None, "camera_ids": None, "gaussian_ids": None, "radii": scene.unflatten(radii), "means2d": means2d, "depths": depths,
        "conics": conics, "opacities": opacity, "tiles_per_gauss": scene.unflatten(tiles), "flatten_ids": ids,
        "isect_offsets": scene.unflatten(tile_starts[:-1].view(*scene.viewmats.shape[:2], down, across)), "width": width, "height": height,
        "tile_size": reference.TILE, "tile_width": across, "tile_height": down, "n_batches": scene.means.shape[0],
        "n_cameras": scene.viewmats.shape[1],
    }  # fmt: skip
    if with_ids:
        meta |= {"largest_id": scene.unflatten(largest), "largest_weight": scene.unflatten(weight)}
    return scene.unflatten(render), scene.unflatten(alpha)[..., None], meta


def _choose(backend: str, means: Tensor) -> str:
    """Return which backend serves these tensors."""
    kind: _native.Kind = "cuda" if means.is_cuda else "cpu"
    single = means.dtype == torch.float32
    if backend == "gsplat":
        optional_import("gsplat", "interop")
        if not means.is_cuda or not single:
            raise ValueError(f"{_OP}: backend 'gsplat' needs float32 tensors on a GPU, got {means.dtype} on {means.device}; use 'native'")
    elif backend == "native":
        if means.is_cuda and not single:
            raise ValueError(f"{_OP}: backend 'native' takes float32 on a GPU, got {means.dtype}; use 'reference', or the CPU")
    elif backend == "auto":
        if means.is_meta or (_native.available(kind) and (single or kind == "cpu")) or _dispatch._forced is not None:
            return "native"
        return "gsplat" if means.is_cuda and single and importlib.util.find_spec("gsplat") is not None else "reference"
    return backend


class _Scene:
    """The checked tensors with leading dimensions flattened to one, B."""

    def __init__(
        self, means: Any, quats: Any, scales: Any, opacities: Any, colors: Any, viewmats: Any, Ks: Any, sh_degree: int | None,
        backgrounds: Any, covars: Any, render_mode: str,
    ) -> None:  # fmt: skip
        means = _floating("means", means, None)
        if means.dim() < 2 or means.shape[-1] != 3:
            raise ValueError(f"{_OP}: means must be [..., N, 3], got {_checks.describe(means)}")
        self.leading, count = means.shape[:-2], means.shape[-2]
        lead = list(self.leading)
        if (covars is None) == (quats is None or scales is None) or (covars is not None and (quats is not None or scales is not None)):
            raise ValueError(f"{_OP}: give quats and scales, or covars instead of both")
        viewmats = _floating("viewmats", viewmats, means)
        if viewmats.dim() != len(lead) + 3:
            raise ValueError(
                f"{_OP}: viewmats must be [..., C, 4, 4] with the leading dimensions {lead} of means, got {_checks.describe(viewmats)}; "
                "one camera needs viewmats[None]"
            )
        cameras = viewmats.shape[-3]
        self.means = self.flatten(means)
        self.viewmats = self.flatten(_shaped("viewmats", viewmats, means, "[..., C, 4, 4]", [*lead, cameras, 4, 4]))
        self.Ks = self.flatten(_shaped("Ks", Ks, means, "[..., C, 3, 3], one per viewmat", [*lead, cameras, 3, 3])).detach()
        self.opacities = self.flatten(_shaped("opacities", opacities, means, "[..., N]", [*lead, count]))
        self.quats = self.scales = self.covars = None
        if covars is None:
            self.quats = self.flatten(_shaped("quats", quats, means, "[..., N, 4]", [*lead, count, 4]))
            self.scales = self.flatten(_shaped("scales", scales, means, "[..., N, 3]", [*lead, count, 3]))
        else:
            self.covars = self.flatten(_shaped("covars", covars, means, "[..., N, 3, 3]", [*lead, count, 3, 3]))
        self.sh_degree = sh_degree
        self.colors: Tensor = self._colors(_floating("colors", colors, means), cameras)
        channels = 3 if sh_degree is not None else self.colors.shape[-1]
        self.backgrounds: Tensor | None = None
        if render_mode in ("D", "ED"):
            self.sh_degree, self.colors = None, self.means.new_empty(self.means.shape[0], 1, count, 0)
        elif backgrounds is not None:
            self.backgrounds = self.flatten(_shaped("backgrounds", backgrounds, means, "[..., C, D]", [*lead, cameras, channels]))

    def _colors(self, colors: Tensor, cameras: int) -> Tensor:
        """Check colours or coefficients and return them with a dimension for cameras."""
        sh_degree = self.sh_degree
        lead, count = list(self.leading), self.means.shape[1]
        form = "[..., N, D] or [..., C, N, D]"
        tail = 1
        if sh_degree is not None:
            if isinstance(sh_degree, bool) or not isinstance(sh_degree, int) or not 0 <= sh_degree <= 3:
                raise ValueError(f"{_OP}: sh_degree must be None, 0, 1, 2 or 3, got {sh_degree!r}")
            form, tail = f"[..., N, K, 3] or [..., C, N, K, 3] with K >= {(sh_degree + 1) ** 2} for sh_degree {sh_degree}", 2
        shape = list(colors.shape)
        per_camera = colors.dim() == len(lead) + 2 + tail
        expected = [*lead, *([cameras] if per_camera else []), count]
        good = shape[:-tail] == expected and len(shape) == len(expected) + tail
        if sh_degree is not None:
            good = good and shape[-1] == 3 and shape[-2] >= (sh_degree + 1) ** 2
        if not good:
            raise ValueError(
                f"{_OP}: colors must be {form}, here N = {count} and C = {cameras}, got {_checks.describe(colors)}"
                + ("" if sh_degree is not None or colors.dim() < 3 else "; coefficients of spherical harmonics need sh_degree")
            )
        colors = self.flatten(colors)
        return colors if per_camera else colors.unsqueeze(1)

    def flatten(self, tensor: Tensor) -> Tensor:
        if len(self.leading) == 1:
            return tensor
        return tensor.flatten(0, len(self.leading) - 1) if self.leading else tensor.unsqueeze(0)

    def unflatten(self, tensor: Tensor) -> Tensor:
        if len(self.leading) == 1:
            return tensor
        return tensor.unflatten(0, self.leading) if self.leading else tensor.squeeze(0)

    def features(self) -> Tensor:
        """Return what is blended, ``[B, C or 1, N, D]``."""
        if self.sh_degree is None:
            return self.colors
        position, failed = _position(self.viewmats)
        if not torch.compiler.is_compiling() and not failed.is_meta and _checks.read_values(failed) and bool(failed.any()):
            raise ValueError(
                f"{_OP}: viewmats[{int(failed.flatten().nonzero()[0])}] is singular: it has no position, which sh_degree needs for the "
                "directions of view"
            )
        # What is not drawn must not enter the graph: a number that is not finite times its gradient 0 is NaN.
        coefficients = self.colors[..., : (self.sh_degree + 1) ** 2, :]
        finite = (coefficients.detach() * 0).flatten(-2).sum(-1) == 0  # [B, C or 1, N]; faster than isfinite().all()
        coefficients = coefficients.masked_fill(~finite[..., None, None], 0.0)
        directions = torch.where(self.means.isfinite().all(-1, keepdim=True), self.means, 0.0)[:, None] - position[:, :, None]
        directions = torch.where(directions.isfinite().all(-1, keepdim=True), directions, 0.0)
        colors = (spherical_harmonics(self.sh_degree, directions, coefficients) + 0.5).clamp(min=0)
        return torch.where(finite[..., None], colors, torch.nan)  # so that the compositing leaves it out


def _position(viewmats: Tensor) -> tuple[Tensor, Tensor]:
    """Return where cameras are ``[B, C, 3]``, the last column of the inverse, and which poses have no inverse ``[B, C]``.

    By Cramer's rule written out: the bits of LAPACK's inverse depend on the processor. A pose that is not finite counts as the identity.
    """
    known = viewmats.isfinite().flatten(-2).all(-1)[..., None, None]
    identity = torch.eye(4, dtype=viewmats.dtype, device=viewmats.device)
    m = torch.where(known, viewmats, identity).double()

    def determinant(i: int, j: int, k: int) -> Tensor:
        (a, d, g), (b, e, h), (c, f, n) = (m[..., :3, column].unbind(-1) for column in (i, j, k))
        return (a * (e * n - f * h) + b * (f * g - d * n)) + c * (d * h - e * g)

    cofactors = (-determinant(1, 2, 3), determinant(0, 2, 3), -determinant(0, 1, 3), determinant(0, 1, 2))
    last = [m[..., 3, i] * cofactors[i] for i in range(4)]
    whole = (last[0] + last[1]) + (last[2] + last[3])
    position = (torch.stack(cofactors[:3], -1) / torch.where(whole != 0, whole, 1.0)[..., None]).to(viewmats.dtype)
    return position, (whole == 0) | ~position.isfinite().all(-1)


def _size(name: str, value: Any) -> int:
    size = _checks.positive(_OP, name, value)
    if size > _LARGEST_SIZE:
        raise ValueError(f"{_OP}: {name} must be at most {_LARGEST_SIZE}, got {size}")
    return size


def _floating(name: str, value: Any, like: Tensor | None) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{_OP}: {name} must be a floating tensor, got {_checks.describe(value)}")
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    if like is not None:
        _checks.same_device(_OP, name, value, like)
        if value.dtype != like.dtype:
            raise TypeError(f"{_OP}: {name} is {value.dtype} but means is {like.dtype}; convert one of them")
    return value


def _shaped(name: str, value: Any, means: Tensor, form: str, shape: list[int]) -> Tensor:
    value = _floating(name, value, means)
    if list(value.shape) != shape:
        raise ValueError(f"{_OP}: {name} must be {form}, here {shape}, got {_checks.describe(value)}")
    return value


def _gsplat(
    scene: _Scene, width: int, height: int, options: dict[str, float], render_mode: str, absgrad: bool, rasterize_mode: str
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The same by the package gsplat, which gets the leading dimensions as they were given, so that ``meta`` has them too."""
    native.check_values(scene.opacities, scene.Ks)
    native.check_background(scene.backgrounds)
    colors = scene.colors.squeeze(1) if scene.colors.shape[1] == 1 else scene.colors
    if render_mode in ("D", "ED"):
        colors = scene.means.new_zeros(*scene.means.shape[:2], 3)
    assert scene.quats is not None
    assert scene.scales is not None
    tensors = (scene.means, scene.quats, scene.scales, scene.opacities, colors, scene.viewmats, scene.Ks)
    backgrounds = None if scene.backgrounds is None else scene.unflatten(scene.backgrounds)
    return optional_import("gsplat", "interop").rasterization(
        *(scene.unflatten(t) for t in tensors), width, height, **options, sh_degree=scene.sh_degree, packed=False,
        backgrounds=backgrounds, render_mode=render_mode, absgrad=absgrad, rasterize_mode=rasterize_mode,
    )  # fmt: skip


def _reference_composite(
    means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, depths: Tensor | None, backgrounds: Tensor | None,
    probe: Tensor | None, ids: Tensor, places: Tensor, tile_starts: Tensor, starts: Tensor, width: int, height: int, with_ids: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    native.check_background(backgrounds)
    return reference.composite(means2d, conics, opacities, features, depths, backgrounds, ids, tile_starts, width, height, with_ids)


_REFERENCE = native.Pipeline(native.project_twin, reference.bin_tiles, _reference_composite)
