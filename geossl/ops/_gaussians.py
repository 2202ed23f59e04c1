"""The registered operators behind :func:`geossl.ops.rasterize_gaussians`: projection, tile lists and compositing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geossl.ops import _checks, _dispatch, _native
from geossl.ops._native import DOUBLE, INT, INT64, PTR
from geossl.ops.reference import gaussians as reference

_OP = "rasterize_gaussians"


class Pipeline(NamedTuple):
    """The three steps of a rasterizer, see :mod:`geossl.ops.reference.gaussians`."""

    project: Callable[..., Any]
    bin_tiles: Callable[..., Any]
    composite: Callable[..., Any]


# is_double, means, quats, scales, covars, opacities, viewmats, Ks, batch, cameras, count, width, height, near, far, clip, eps, antialiased
_SCENE = (INT, *[PTR] * 7, *[INT64] * 3, INT, INT, *[DOUBLE] * 4, INT)
# scene, means2d, depths, conics, opacities, radii, tiles
_project_c = _dispatch.functions("gaussians_project", *_SCENE, *[PTR] * 6)
# scene, radii, gradients of means2d, depths, conics, opacities; of means, quats, scales, covars, opacities, viewmats; workspace (CUDA)
_project_backward_c = _dispatch.functions("gaussians_project_backward", *_SCENE, *[PTR] * 12)
# tiles, rows, starts
_starts_cpu = _native.function("cpu", "geossl_gaussians_starts_cpu", INT, PTR, INT64, PTR)
# is_double, means2d, conics, opacities, depths, radii, images, count, width, height, starts, ids, places, tile_starts
_bin_cpu = _native.function("cpu", "geossl_gaussians_bin_cpu", INT, INT, *[PTR] * 5, INT64, INT64, INT, INT, *[PTR] * 4)
# means2d, conics, opacities, depths, radii, images, count, width, height, starts, keys, rows
_emit_cuda = _native.function("cuda", "geossl_gaussians_emit_cuda", INT, PTR, *[PTR] * 5, INT64, INT64, INT, INT, PTR, PTR, PTR)
# wide, temp, temp_bytes, keys, sorted keys, rows, sorted rows, count, bits
_sort_cuda = _native.function("cuda", "geossl_sort_pairs_cuda", INT, PTR, INT, PTR, PTR, PTR, PTR, PTR, PTR, INT64, INT)
# keys, rows, entries, tiles, ids, places, tile_starts
_ranges_cuda = _native.function("cuda", "geossl_gaussians_tile_ranges_cuda", INT, PTR, PTR, PTR, INT64, INT64, PTR, PTR, PTR)
# is_double, means2d, conics, opacities, features, depths, ids, places, tile_starts, starts, images, cameras, count, channels,
# features_per_camera, with_depths, width, height, background
_DRAWING = (INT, *[PTR] * 9, *[INT64] * 4, *[INT] * 4, PTR)
# drawing, render, alpha, rest, last, largest, heaviest
_composite_c = _dispatch.functions("gaussians_composite", *_DRAWING, *[PTR] * 6)
# drawing, rest, last, gradients of render and alpha, workspace (CUDA); gradients of means2d, conics, opacities, features, depths,
# background, and the absolute one of means2d
_composite_backward_c = _dispatch.functions("gaussians_composite_backward", *_DRAWING, *[PTR] * 12)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _differentiate(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> list[Tensor]:
    """Gradients of a twin by autograd, which is switched off inside operators; empty for inputs that are None."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        wanted = [leaf for leaf in leaves if leaf is not None]
        pairs = [(out, grad) for out, grad in zip(function(*leaves), grads, strict=True) if out.requires_grad]  # not of empty scenes
        outputs, weights = zip(*pairs, strict=True) if pairs else ((), ())
        zeros = [torch.zeros_like(leaf) for leaf in wanted]
        found = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True, materialize_grads=True) if pairs else zeros)
    return [grads[0].new_empty(0) if leaf is None else next(found) for leaf in leaves]


def check_values(opacities: Tensor, Ks: Tensor) -> None:
    """Refuse what is surely a mistake; what is merely degenerate is not drawn."""
    if not _checks.read_values(opacities):
        return
    # On the CPU by numpy: of a large tensor, torch would wake its own threads, which then spin beside those of the kernels.
    values = opacities.detach() if opacities.is_cuda else opacities.detach().numpy()
    if (values < 0).any() or (values > 1).any():
        low, high = (float(v) for v in opacities.detach().nan_to_num(0.5).aminmax())
        raise ValueError(f"{_OP}: opacities must lie in [0, 1], got values from {low:g} to {high:g}; of logits take torch.sigmoid")
    if not bool(Ks.isfinite().all()):
        raise ValueError(f"{_OP}: Ks must be finite, got {Ks[~Ks.isfinite().flatten(-2).all(-1)][0].tolist()}")
    focal = Ks[..., [0, 1], [0, 1]]
    if not bool((focal > 0).all()):
        raise ValueError(f"{_OP}: Ks must have positive focal lengths K[0, 0] and K[1, 1], got {focal.flatten(0, -2).tolist()[:4]}")


def check_background(backgrounds: Tensor | None) -> None:
    """Refuse backgrounds that would make the whole image NaN."""
    if backgrounds is not None and _checks.read_values(backgrounds) and not bool(backgrounds.isfinite().all()):
        raise ValueError(f"{_OP}: backgrounds must be finite, got {backgrounds[~backgrounds.isfinite().all(-1)][0].tolist()[:8]}")


# Projection ---------------------------------------------------------------------------------------------------------------------------


def _scene(
    means: Tensor, quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int, near_plane: float, far_plane: float, radius_clip: float, eps2d: float, antialiased: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the C arguments of contiguous tensors."""
    tensors = map(_dispatch.pointer, (means, quats, scales, covars, opacities, viewmats, Ks))
    batch, count = means.shape[:2]
    return (
        means.dtype == torch.float64, *tensors, batch, viewmats.shape[1], count, width, height, near_plane, far_plane, radius_clip, eps2d,
        antialiased,
    )  # fmt: skip


def _project_fake(means: Tensor, quats: Any, scales: Any, covars: Any, opacities: Any, viewmats: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = (means.shape[0], viewmats.shape[1], means.shape[1])
    return (
        means.new_empty(*shape, 2), means.new_empty(shape), means.new_empty(*shape, 3), means.new_empty(shape),
        means.new_empty(*shape, 2, dtype=torch.int32), means.new_empty(shape, dtype=torch.int32),
    )  # fmt: skip


def _project_native(kind: Any, *arguments: Any) -> tuple[Tensor, ...]:
    check_values(arguments[4], arguments[6])
    scene = (*_contiguous(*arguments[:7]), *arguments[7:])
    out = _project_fake(*scene)
    _project_c[kind](*_dispatch.place(kind, arguments[0]), *_scene(*scene), *(t.data_ptr() for t in out))
    return out


def project_twin(*arguments: Any) -> tuple[Tensor, ...]:
    """:func:`geossl.ops.reference.gaussians.project`, after the check of values."""
    check_values(arguments[4], arguments[6])
    return reference.project(*arguments)


def _project_backward_fake(
    v_means2d: Tensor, v_depths: Tensor, v_conics: Tensor, v_opacities: Tensor, radii: Tensor, with_pose: bool, means: Tensor,
    quats: Tensor | None, scales: Tensor | None, covars: Tensor | None, opacities: Tensor, viewmats: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (means, quats, scales, covars, opacities, viewmats if with_pose else None)
    return tuple(means.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _project_backward_native(kind: Any, *arguments: Any) -> tuple[Tensor, ...]:
    v_means2d, v_depths, v_conics, v_opacities, radii = _contiguous(*arguments[:5])
    with_pose, scene = arguments[5], (*_contiguous(*arguments[6:13]), *arguments[13:])
    out = _project_backward_fake(*arguments[:6], *scene)
    means, viewmats = scene[0], scene[5]
    partial = None
    if kind == "cuda" and with_pose:
        partial = means.new_zeros(*viewmats.shape[:2], -(-means.shape[1] // 256), 12)
    pointers = [t.data_ptr() if given is not None else 0 for t, given in zip(out[:5], scene[:5], strict=True)]
    _project_backward_c[kind](
        *_dispatch.place(kind, means), *_scene(*scene), *map(_dispatch.pointer, (radii, v_means2d, v_depths, v_conics, v_opacities)),
        *pointers, out[5].data_ptr() if with_pose else 0, _dispatch.pointer(partial),
    )  # fmt: skip
    if partial is not None:
        pose = torch.nn.functional.pad(partial.sum(2).unflatten(-1, (3, 4)), (0, 0, 0, 1))
        return (*out[:5], pose)
    return out


def _project_backward_twin(*arguments: Any) -> tuple[Tensor, ...]:
    grads, with_pose, scene = arguments[:4], arguments[5], arguments[6:]

    def run(means: Any, quats: Any, scales: Any, covars: Any, opacities: Any, viewmats: Any) -> tuple[Tensor, ...]:
        return reference.project(means, quats, scales, covars, opacities, viewmats, *scene[6:])[:4]

    found = _differentiate(run, scene[:6], grads)
    return (*found[:5], found[5] if with_pose else found[5].new_empty(0))


_SCENE_SCHEMA = (
    "Tensor means, Tensor? quats, Tensor? scales, Tensor? covars, Tensor opacities, Tensor viewmats, Tensor Ks, int width, int height, "
    "float near_plane, float far_plane, float radius_clip, float eps2d, bool antialiased"
)
_project = _dispatch.define(
    f"gaussians_project({_SCENE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    native=_project_native,
    twin=project_twin,
    fake=_project_fake,
)
_project_backward = _dispatch.define(
    "gaussians_project_backward(Tensor v_means2d, Tensor v_depths, Tensor v_conics, Tensor v_opacities, Tensor radii, bool with_pose, "
    f"{_SCENE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    native=_project_backward_native,
    twin=_project_backward_twin,
    fake=_project_backward_fake,
)


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[4])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[4], output[5])


def _projection_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *scene, radii = ctx.saved_tensors
    found = _project_backward(*grads[:4], radii, ctx.needs_input_grad[5], *scene, *ctx.options)
    given = [gradient if t is not None else None for gradient, t in zip(found, scene[:6], strict=True)]
    return (*given[:5], given[5] if ctx.needs_input_grad[5] else None, *[None] * (1 + len(ctx.options)))


torch.library.register_autograd("geossl::gaussians_project", _projection_gradient, setup_context=_save_projection, lib=_dispatch.LIBRARY)


# Tile lists ---------------------------------------------------------------------------------------------------------------------------


def _bin_fake(
    means2d: Tensor, conics: Tensor, opacities: Tensor, depths: Tensor, radii: Tensor, tiles: Tensor, width: int, height: int
) -> tuple[Tensor, ...]:
    entries = torch.library.get_ctx().new_dynamic_size()
    return _bin_outputs(means2d, entries, width, height)


def _bin_outputs(means2d: Tensor, entries: Any, width: int, height: int) -> tuple[Tensor, ...]:
    images, count = means2d.shape[0] * means2d.shape[1], means2d.shape[2]
    tile_count = (width + reference.TILE - 1) // reference.TILE * ((height + reference.TILE - 1) // reference.TILE)
    return (
        means2d.new_empty(entries, dtype=torch.int32), means2d.new_empty(entries, dtype=torch.int32),
        means2d.new_empty(images * tile_count + 1, dtype=torch.int64), means2d.new_empty(images * count + 1, dtype=torch.int64),
    )  # fmt: skip


def _bin_native(
    kind: Any, means2d: Tensor, conics: Tensor, opacities: Tensor, depths: Tensor, radii: Tensor, tiles: Tensor, width: int, height: int
) -> tuple[Tensor, ...]:
    means2d, conics, opacities, depths, radii = _contiguous(means2d, conics, opacities, depths, radii)  # type: ignore[assignment]
    images, count = means2d.shape[0] * means2d.shape[1], means2d.shape[2]
    starts = torch.empty(images * count + 1, dtype=torch.int64, device=tiles.device)
    if kind == "cpu":
        _starts_cpu(*_dispatch.place(kind, tiles), tiles.contiguous().data_ptr(), images * count, starts.data_ptr())
    else:
        starts[0] = 0
        torch.cumsum(tiles.reshape(-1), 0, out=starts[1:])
    ids, places, tile_starts, _ = _bin_outputs(means2d, int(starts[-1]), width, height)
    splats = [t.data_ptr() for t in (means2d, conics, opacities, depths, radii)]
    lists = [t.data_ptr() for t in (ids, places, tile_starts)]
    place = _dispatch.place(kind, means2d)
    if kind == "cpu":
        _bin_cpu(*place, means2d.dtype == torch.float64, *splats, images, count, width, height, starts.data_ptr(), *lists)
        return ids, places, tile_starts, starts
    keys, rows, sorted_keys, sorted_rows = torch.empty(4, ids.shape[0], dtype=torch.int64, device=ids.device)
    _emit_cuda(*place, *splats, images, count, width, height, starts.data_ptr(), keys.data_ptr(), rows.data_ptr())
    if ids.shape[0] == 0:
        return ids, places, tile_starts.zero_(), starts
    tile_count = tile_starts.shape[0] - 1
    pairs = [t.data_ptr() for t in (keys, sorted_keys, rows, sorted_rows)]
    size = torch.zeros(1, dtype=torch.int64)
    bits = 32 + max(tile_count - 1, 1).bit_length()
    _sort_cuda(*place, 1, 0, size.data_ptr(), *pairs, ids.shape[0], bits)
    temporary = torch.empty(int(size), dtype=torch.uint8, device=ids.device)
    _sort_cuda(*place, 1, temporary.data_ptr(), size.data_ptr(), *pairs, ids.shape[0], bits)
    _ranges_cuda(*place, sorted_keys.data_ptr(), sorted_rows.data_ptr(), ids.shape[0], tile_count, *lists)
    return ids, places, tile_starts, starts


_bin = _dispatch.define(
    "gaussians_bin(Tensor means2d, Tensor conics, Tensor opacities, Tensor depths, Tensor radii, Tensor tiles, int width, int height) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    native=_bin_native,
    twin=reference.bin_tiles,
    fake=_bin_fake,
)


# Compositing --------------------------------------------------------------------------------------------------------------------------


def _drawing(
    means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, depths: Tensor | None, backgrounds: Tensor | None,
    probe: Tensor | None, ids: Tensor, places: Tensor, tile_starts: Tensor, starts: Tensor, width: int, height: int, *_: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the C arguments of contiguous tensors."""
    batch, cameras, count = opacities.shape
    tensors = map(_dispatch.pointer, (means2d, conics, opacities, features, depths, ids, places, tile_starts, starts))
    return (
        means2d.dtype == torch.float64, *tensors, batch * cameras, max(cameras, 1), count, features.shape[3], features.shape[1] == cameras,
        depths is not None, width, height, _dispatch.pointer(backgrounds),
    )  # fmt: skip


def _composite_fake(
    means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor, depths: Tensor | None, backgrounds: Tensor | None,
    probe: Tensor | None, ids: Tensor, places: Tensor, tile_starts: Tensor, starts: Tensor, width: int, height: int, with_ids: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shape = (opacities.shape[0], opacities.shape[1], height, width)
    found = shape if with_ids else (0,)
    return (
        means2d.new_empty(*shape, features.shape[3] + (depths is not None)), means2d.new_empty(shape), means2d.new_empty(shape),
        means2d.new_empty(shape, dtype=torch.int32), means2d.new_empty(found, dtype=torch.int32), means2d.new_empty(found),
    )  # fmt: skip


def _composite_native(kind: Any, *arguments: Any) -> tuple[Tensor, ...]:
    check_background(arguments[5])
    drawing = (*_contiguous(*arguments[:6]), None, *_contiguous(*arguments[7:11]), *arguments[11:])
    out = _composite_fake(*drawing)
    pointers = [t.data_ptr() for t in out[:4]] + [t.data_ptr() if drawing[-1] else 0 for t in out[4:]]
    _composite_c[kind](*_dispatch.place(kind, arguments[0]), *_drawing(*drawing), *pointers)
    return out


def _composite_twin(*arguments: Any) -> tuple[Tensor, ...]:
    """The reference says all but the last entry of each pixel, which its gradient does not need."""
    check_background(arguments[5])
    inputs: Any = (*arguments[:6], arguments[7], arguments[9], *arguments[11:])
    render, alpha, largest, weight = reference.composite(*inputs)
    return render, alpha, 1 - alpha, torch.zeros_like(alpha, dtype=torch.int32), largest, weight


def _composite_backward_fake(
    v_render: Tensor, v_alpha: Tensor, rest: Tensor, last: Tensor, means2d: Tensor, conics: Tensor, opacities: Tensor, features: Tensor,
    depths: Tensor | None, backgrounds: Tensor | None, probe: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (means2d, conics, opacities, features, depths, backgrounds, probe)
    return tuple(means2d.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _composite_backward_native(kind: Any, *arguments: Any) -> tuple[Tensor, ...]:
    v_render, v_alpha, rest, last = _contiguous(*arguments[:4])
    drawing = (*_contiguous(*arguments[4:10]), arguments[10], *_contiguous(*arguments[11:15]), *arguments[15:])
    out = _composite_backward_fake(v_render, v_alpha, rest, last, *drawing)  # type: ignore[arg-type]
    slots = None
    if kind == "cuda":
        slots = out[0].new_empty(drawing[7].shape[0] * (6 + 2 * (drawing[6] is not None) + v_render.shape[-1]))  # type: ignore[union-attr]
    pointers = [t.data_ptr() if given is not None else 0 for t, given in zip(out, drawing[:7], strict=True)]
    _composite_backward_c[kind](
        *_dispatch.place(kind, out[0]), *_drawing(*drawing), *map(_dispatch.pointer, (rest, last, v_render, v_alpha, slots)), *pointers,
    )  # fmt: skip
    if kind == "cuda" and drawing[5] is not None:
        behind = (rest[..., None] * v_render[..., : drawing[5].shape[-1]]).sum((2, 3))  # type: ignore[index]
        return (*out[:5], behind, out[6])
    return out


def _composite_backward_twin(v_render: Tensor, v_alpha: Tensor, rest: Tensor, last: Tensor, *drawing: Any) -> tuple[Tensor, ...]:
    def run(*tensors: Any) -> tuple[Tensor, ...]:
        inputs: Any = (*tensors, drawing[7], drawing[9], *drawing[11:])
        return reference.composite(*inputs)[:2]

    found = _differentiate(run, drawing[:6], (v_render, v_alpha))
    # The sum of absolute values is no derivative; where it is asked for, the native kernels must run.
    return (*found, v_render.new_empty(0) if drawing[6] is None else torch.full_like(drawing[6], torch.nan))


_DRAWING_SCHEMA = (
    "Tensor means2d, Tensor conics, Tensor opacities, Tensor features, Tensor? depths, Tensor? backgrounds, Tensor? probe, Tensor ids, "
    "Tensor places, Tensor tile_starts, Tensor starts, int width, int height, bool with_ids"
)
_composite = _dispatch.define(
    f"gaussians_composite({_DRAWING_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    native=_composite_native,
    twin=_composite_twin,
    fake=_composite_fake,
)
_composite_backward = _dispatch.define(
    f"gaussians_composite_backward(Tensor v_render, Tensor v_alpha, Tensor rest, Tensor last, {_DRAWING_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    native=_composite_backward_native,
    twin=_composite_backward_twin,
    fake=_composite_backward_fake,
)


def _save_drawing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:11], output[2], output[3])
    ctx.options = inputs[11:]
    ctx.mark_non_differentiable(*output[2:])


def _drawing_gradient(ctx: Any, v_render: Tensor, v_alpha: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *drawing, rest, last = ctx.saved_tensors
    found = _composite_backward(v_render, v_alpha, rest, last, *drawing, *ctx.options)
    given = [gradient if t is not None else None for gradient, t in zip(found, drawing[:7], strict=True)]
    return (*given, *[None] * (4 + len(ctx.options)))


torch.library.register_autograd("geossl::gaussians_composite", _drawing_gradient, setup_context=_save_drawing, lib=_dispatch.LIBRARY)


def _refuse_twice(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    raise RuntimeError(
        f"{_OP}: the native kernels can be differentiated once; for derivatives of gradients (create_graph=True) use backend='reference'"
    )


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


for _name in ("gaussians_project_backward", "gaussians_composite_backward"):
    torch.library.register_autograd(f"geossl::{_name}", _refuse_twice, setup_context=_save_nothing, lib=_dispatch.LIBRARY)


def _composite_outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    render, alpha, _, _, largest, heaviest = _composite(*arguments)
    return render, alpha, largest, heaviest


PIPELINE = Pipeline(_project, _bin, _composite_outputs)
