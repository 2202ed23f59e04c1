"""Wrong arguments: refused before any kernel runs, naming the operator, the argument, what came and what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geossl import ops
from geossl.ops import _checks

P = torch.rand(2, 8, 3)
F = torch.rand(12, 3)
OFF = torch.tensor([0, 4, 12])
fps, knn, ball, group = ops.farthest_point_sample, ops.knn, ops.ball_query, ops.group
relative, nms = ops.group_relative, ops.centrality_nms
chamfer, packed, patches = ops.chamfer_distance, ops.chamfer_distance_packed, ops.chamfer_distance_patches

CASES = [
    # Coordinates, the same for every operator.
    (lambda: fps(np.zeros((1, 4, 3)), 2), TypeError, "farthest_point_sample: points must be a tensor"),
    (lambda: fps(P[0], 2), ValueError, r"points must be \[B, N, 3\]; a single cloud \[N, 3\] needs points\[None\]"),
    (lambda: fps(P[..., :2], 2), ValueError, "got float32"),
    (lambda: knn(torch.rand(2, 8, 6), P, 2), ValueError, r"knn: query must be .*points\[..., :3\]"),
    (lambda: knn(P.long(), P, 2), TypeError, "query must be float32 or float64"),
    (lambda: knn(P, P.double(), 2), TypeError, "points is torch.float64 but the other cloud is torch.float32"),
    (lambda: knn(P, torch.empty(2, 8, 3, device="meta"), 2), ValueError, "points is on meta but the points are on cpu"),
    (lambda: knn(P, P[:1], 2), ValueError, "same number of clouds B, got 2 and 1"),
    (lambda: knn(P, F, 2, query_offsets=OFF, offsets=OFF), ValueError, r"query must be \[M, 3\] because offsets were given"),
    # Counts.
    (lambda: fps(P, 0), ValueError, "k must be at least 1, got 0"),
    (lambda: knn(P, P, -1), ValueError, "k must be at least 1, got -1"),
    (lambda: knn(P, P, 2.0), TypeError, "k must be a whole number, got float 2.0"),
    (lambda: ball(P, P, 0.1, True), TypeError, "k must be a whole number"),
    (lambda: fps(F, 1.5, offsets=OFF), ValueError, r"must lie in \(0, 1\], got 1.5"),
    (lambda: fps(F, torch.tensor([1, 2, 3]), offsets=OFF), ValueError, r"k must be \[B\], one number per cloud = \[2\]"),
    (lambda: fps(F, torch.tensor([1, -2]), offsets=OFF), ValueError, "k must not be negative, got -2 for cloud 1"),
    # Lengths and offsets.
    (lambda: fps(P, 2, lengths=torch.tensor([8, 9])), ValueError, "lengths must lie between 0 and 8, the padded size of the clouds; got 9"),
    (lambda: knn(P, P, 2, lengths=torch.tensor([-1, 2])), ValueError, "got -1"),
    (lambda: knn(P, P, 2, query_lengths=torch.tensor([1])), ValueError, "query_lengths must be"),
    (lambda: knn(P, P, 2, lengths=torch.tensor([1.0, 2.0])), TypeError, "lengths must be an int64 or int32 tensor"),
    (lambda: fps(F, 2, offsets=OFF, lengths=torch.tensor([1, 2])), ValueError, "not both"),
    (lambda: fps(F, 2, offsets=torch.tensor([0, 4, 11])), ValueError, r"end at the number of rows \(12\), got \[0, 4, 11\]"),
    (lambda: fps(F, 2, offsets=torch.tensor([0, 5, 4, 12])), ValueError, "never decrease"),
    (lambda: fps(F, 2, offsets=torch.tensor([1, 12])), ValueError, "start at 0"),
    (lambda: fps(F, 2, offsets=OFF[None]), ValueError, "offsets must be an int64 tensor"),
    (lambda: fps(F, 2, offsets=[0, 12]), ValueError, "offsets must be an int64 tensor"),
    (lambda: knn(F, F, 2, offsets=OFF), ValueError, "query_offsets is missing"),
    (lambda: knn(F, F, 2, query_offsets=OFF), ValueError, "knn: packed clouds need both query_offsets and offsets, but offsets is missing"),
    (lambda: knn(F, F, 2, offsets=OFF, query_offsets=OFF[1:] - 4), ValueError, "same length"),
    (lambda: packed(F, None, F, OFF), ValueError, r"x_offsets must be an int64 tensor \[B \+ 1\], got None; padded clouds go to"),
    (lambda: packed(F, OFF, F, None), ValueError, "y_offsets must be an int64 tensor"),
    (lambda: ops.three_nn_interpolate(P, P.tolist(), P), TypeError, "three_nn_interpolate: points must be a tensor"),
    # Sampling.
    (lambda: fps(P, 2, start=8), ValueError, r"it is 8 for cloud 0, which has 8 points \(rows 0 to 7\)"),
    (lambda: fps(P, 2, start=torch.tensor([0, -1])), ValueError, "it is -1 for cloud 1"),
    (lambda: fps(F, 2, offsets=OFF, start=5), ValueError, "it is 5 for cloud 0, which has 4 points"),
    (lambda: fps(P, 2, start="first"), TypeError, "start must be an int, a tensor"),
    (lambda: fps(P, 2, start=torch.tensor([0, 1, 2])), ValueError, "start must be"),
    (lambda: fps(P, 2, mask=torch.ones(2, 7, dtype=torch.bool)), ValueError, r"mask must be bool \[2, 8\]"),
    (lambda: fps(P, 2, mask=torch.ones(2, 8)), ValueError, "mask must be bool"),
    (lambda: fps(P, 2, min_sq_norm=-1), ValueError, "min_sq_norm must be a squared distance"),
    (lambda: fps(P, 2, min_sq_norm=float("nan")), ValueError, "min_sq_norm"),
    # Radius and modes.
    (lambda: knn(P, P, 2, radius=0), ValueError, "radius must be positive"),
    (lambda: knn(P, P, 2, radius=float("nan")), ValueError, "radius must be positive"),
    (lambda: knn(P, P, 2, radius=torch.ones(2, 8)), TypeError, "radius must be a number"),
    (lambda: ball(P, P, -0.5, 2), ValueError, "ball_query: radius must be positive"),
    (lambda: ball(P, P, torch.zeros(2, 8), 2), ValueError, "radius must be positive for every query, got 0"),
    (lambda: ball(P, P, torch.full((2, 8), torch.nan), 2), ValueError, "for every query, got nan"),
    (lambda: ball(P, P, torch.ones(2, 7), 2), ValueError, r"one radius per query, \[2, 8\]"),
    (lambda: ball(P, P, 0.5, 2, mode="neerest"), ValueError, "unknown ball_query mode 'neerest'; did you mean 'nearest'"),
    (lambda: ball(P, P, 0.5, 2, fill="zero"), ValueError, "unknown ball_query fill"),
    (lambda: ops.radius_search(P, P, 0), ValueError, "radius_search: radius must be positive"),
    (lambda: ops.radius_search(P, P, "1"), TypeError, "radius_search: radius must be a number"),
    (lambda: ops.radius_search(P, P, torch.zeros(2, 8)), ValueError, "radius_search: radius must be positive for every query, got 0"),
    (lambda: ops.radius_search(P, P, torch.ones(2)), ValueError, r"one radius per query, \[2, 8\]"),
    (lambda: ops.radius_search(P, F, 1.0), ValueError, r"points must be \[B, N, 3\]"),
    (lambda: ops.radius_search(P, P, 1.0, lengths=torch.tensor([1, 9])), ValueError, "radius_search: lengths must lie between 0 and 8"),
    # Suppression.
    (lambda: ball(P, P, True, 2), TypeError, "ball_query: radius must be a number, got bool True"),
    (lambda: nms(P, 0.0), ValueError, "centrality_nms: radius must be positive"),
    (lambda: nms(P, torch.ones(2)), TypeError, "centrality_nms: radius must be a number"),
    (lambda: nms(P, 1.0, max_neighbors=0), ValueError, "max_neighbors must be at least 1, got 0"),
    (lambda: nms(P.long(), 2.0**31), ValueError, r"at most 2\*\*30, got 2147483648.0"),
    (lambda: nms(P.short(), 1.0), TypeError, "points must be float32 or float64"),
    (lambda: nms((P * 8).long() - 2**62, 1.0), ValueError, r"integer coordinates must be smaller than 2\*\*62, got -46"),
    (lambda: nms(P, 1.0, lengths=torch.tensor([9, 1])), ValueError, "centrality_nms: lengths must lie between 0 and 8"),
    (lambda: nms(F, 1.0, offsets=OFF - 1), ValueError, "centrality_nms: offsets must start at 0"),
    # Groups.
    (lambda: group(P[0, 0], torch.tensor([0])), ValueError, "features must be"),
    (lambda: group(F, torch.tensor([0.0])), TypeError, "index must be an int64 or int32 tensor"),
    (lambda: group(F, torch.tensor([12])), ValueError, "index must lie between -1 .* and 11, as features have 12 rows; got 12"),
    (lambda: group(F, torch.tensor([-2])), ValueError, "got -2"),
    (lambda: group(P, torch.zeros(3, 1, dtype=torch.int64)), ValueError, "with B = 2"),
    (
        lambda: relative(P, P[:, :3], torch.zeros(2, 2, 4, dtype=torch.int64)),
        ValueError,
        r"index must be \[2, 3, 'k'\], one row per center",
    ),
    (lambda: relative(P, F, torch.zeros(2, 2, 4, dtype=torch.int64)), ValueError, r"group_relative: centers must be \[B, N, 3\]"),
    (lambda: relative(F, F, torch.full((12, 1), 12)), ValueError, "group_relative: index must lie between -1 .* as points have 12 rows"),
    (lambda: relative(F, F, torch.zeros(12, 1)), TypeError, "group_relative: index must be an int64 or int32"),
    (
        lambda: relative(F, F, torch.zeros(12, 1).long(), F[:5]),
        ValueError,
        r"features must be floating with one row per point, \[12, 'C'\]",
    ),
    (lambda: relative(F, F, torch.zeros(12, 1).long(), radius=0), ValueError, "group_relative: radius must be positive"),
    (lambda: relative(F, F, torch.zeros(12, 1).long(), radius=1e-60), ValueError, "not underflow in torch.float32, got 1e-60"),
    # Interpolation.
    (lambda: ops.interpolate(F, torch.tensor([[12]]), torch.ones(1, 1)), ValueError, "interpolate: index must lie .* got 12"),
    (lambda: ops.interpolate(F, torch.tensor([[1]]), torch.ones(1, 2)), ValueError, r"weight must be floating with one number per index"),
    (lambda: ops.interpolate(F.long(), torch.tensor([[1]]), torch.ones(1, 1)), TypeError, "features must be floating"),
    (lambda: ops.interpolate(F, torch.tensor(1), torch.tensor(1.0)), ValueError, r"index must be \[..., k\]"),
    (lambda: ops.three_nn_interpolate(P, P, P[:, :5]), ValueError, r"features must have one row per point, \[2, 8, 'C'\]"),
    (lambda: ops.three_nn_interpolate(P, P, P, eps=0), ValueError, "eps must be a positive number"),
    (lambda: ops.three_nn_interpolate(P, P, P, k=0), ValueError, "k must be at least 1"),
    # Chamfer.
    (lambda: chamfer(P, P[:1]), ValueError, "chamfer_distance: x and y must have the same number of clouds, got 2 and 1"),
    (lambda: chamfer(P, P, norm="cdl1"), ValueError, "unknown chamfer_distance norm 'cdl1'.*Known: l1, l2, l2sq"),
    (lambda: chamfer(P, P, direction="forward"), ValueError, "unknown chamfer_distance direction"),
    (lambda: chamfer(P, P, reduction="average"), ValueError, "unknown chamfer_distance reduction"),
    (lambda: chamfer(P, P, weights=torch.ones(3)), ValueError, r"weights must be floating \[2\]"),
    (lambda: chamfer(P, P, x_lengths=torch.tensor([9, 1])), ValueError, "x_lengths must lie between 0 and 8"),
    (lambda: packed(F, OFF, F, OFF[:2]), ValueError, "same number of clouds"),
    (lambda: packed(F, OFF, F, OFF + 1), ValueError, "chamfer_distance_packed: y_offsets must start at 0"),
    (lambda: patches(F, F), ValueError, r"x must be \[..., K, D\] with at least one leading dimension"),
    (lambda: chamfer(P, P[..., :2]), ValueError, "must have the same number of channels D, got 3 and 2 in y"),
    (lambda: chamfer(P[..., :0], P[..., :0]), ValueError, r"x must be \[B, N, D\].*D is at least 1"),
    (lambda: packed(P, OFF, F, OFF), ValueError, r"x must be \[M, D\] because offsets were given"),
    (lambda: patches(P, P[:1]), ValueError, "same leading dimensions"),
    # Offsets.
    (lambda: ops.offsets_from_batch(torch.tensor([0, 1, 0])), ValueError, "batch must be sorted"),
    (lambda: ops.offsets_from_batch(torch.tensor([0, 3]), size=3), ValueError, r"must lie in 0..2, got 3"),
    (lambda: ops.offsets_from_lengths(torch.tensor([2, -1])), ValueError, "must not be negative, got -1"),
    (lambda: ops.offsets_from_ends(torch.tensor([2, 1])), ValueError, "must not decrease"),
]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i][2])[:40])
def test_wrong_arguments(backend, number):
    call, error, message = CASES[number]
    with pytest.raises(error, match=message):
        call()


def test_integer_like_counts_are_accepted():
    assert knn(P, P, np.int64(2)).index.shape == (2, 8, 2)
    assert fps(P, 3, start=np.int32(1))[0, 0] == 1
    assert torch.equal(fps(P, 3, lengths=torch.tensor([8, 4], dtype=torch.int32)), fps(P, 3, lengths=torch.tensor([8, 4])))
    index = torch.tensor([[1], [2]], dtype=torch.int32)
    assert torch.equal(group(P, index), group(P, index.long()))


def test_offsets():
    assert ops.batch_from_offsets(torch.tensor([0, 2, 2, 3, 3])).tolist() == [0, 0, 2]
    assert ops.offsets_from_batch(torch.tensor([0, 0, 2]), size=4).tolist() == [0, 2, 2, 3, 3]
    assert ops.offsets_from_batch(torch.zeros(0, dtype=torch.int64)).tolist() == [0]
    assert ops.offsets_from_ends(torch.tensor([2, 2, 5])).tolist() == [0, 2, 2, 5]
    assert ops.offsets_from_lengths(torch.tensor([2, 0, 3], dtype=torch.int32)).tolist() == [0, 2, 2, 5]


def test_clouds_beyond_32_bits_are_refused(monkeypatch):
    monkeypatch.setattr(_checks, "LARGEST_CLOUD", 7)
    with pytest.raises(ValueError, match="a cloud has more than 7 rows"):
        fps(F, 2, offsets=OFF)
    assert fps(F, 2, offsets=torch.tensor([0, 6, 12]))[0].shape == (4,)
