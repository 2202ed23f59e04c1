"""Containers check their shapes, convert without loss, and move to a device whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geossl.geometry import ImageBatch, PackedPoints, PointBatch, SparseVoxelTokens, Tokens, denormalize_images, normalize_images


@given(lengths=st.lists(st.integers(0, 4), max_size=4), columns=st.integers(3, 5))
def test_padded_and_packed_hold_the_same_rows(lengths, columns):
    longest = max(lengths, default=0)
    padded = torch.full((len(lengths), longest, columns), torch.nan)
    for cloud, n in enumerate(lengths):
        padded[cloud, :n] = torch.randn(n, columns)
    packed = PackedPoints.from_padded(padded, torch.tensor(lengths, dtype=torch.int64))
    assert packed.lengths.tolist() == lengths
    assert not packed.coord.isnan().any()
    rows = packed.coord if packed.feats is None else torch.cat([packed.coord, packed.feats], 1)
    for cloud, part in enumerate(rows.split(lengths)):
        assert torch.equal(part, padded[cloud, : lengths[cloud]])


def test_without_lengths_every_row_counts():
    packed = PackedPoints.from_padded(torch.randn(3, 5, 3))
    assert packed.offsets.tolist() == [0, 5, 10, 15]
    assert PackedPoints.from_padded(torch.randn(2, 0, 3)).offsets.tolist() == [0, 0, 0]
    assert len(PackedPoints.from_padded(torch.randn(0, 5, 3))) == 0


def test_tokens_pad_with_zeros_and_a_mask():
    padded, mask = Tokens(torch.arange(6.0).view(3, 2), torch.zeros(3, 3), torch.tensor([0, 1, 1, 3])).to_padded()
    assert mask.tolist() == [[True, False], [False, False], [True, True]]
    assert padded[mask].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert float(padded[~mask].abs().sum()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(4, 2), torch.tensor([0, 4])), r"coord must be \[M, 3\], got \[4, 2\]"),
        ((torch.randn(4, 3), torch.tensor([0, 4], dtype=torch.int32)), r"offsets must be \[B \+ 1\] int64"),
        ((torch.randn(4, 3), torch.tensor([0, 4]), torch.randn(3, 2)), r"feats must be \[4, C\], got \[3, 2\]"),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedPoints(*arguments)


def test_a_batch_moves_whole_but_its_slots_stay_where_the_draws_are_made():
    points = PackedPoints.from_padded(torch.randn(2, 3, 4))
    batch = PointBatch(points, torch.tensor([0, 1]), torch.tensor([5, 6]), torch.tensor([1, 3]), 4).to("meta")
    assert {batch.points.coord.device.type, batch.points.feats.device.type, batch.label.device.type, batch.index.device.type} == {"meta"}
    assert batch.slot.device.type == "cpu"
    assert batch.global_size == 4


def test_sparse_voxels_to_dense_and_back():
    grid = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64) * (torch.rand(2, 1, 4, 5, 6) < 0.2)
    tokens = SparseVoxelTokens.from_dense(grid, voxel_size=(1.0, 2.0, 0.5), origin=(-1.0, 0.0, 3.0))
    assert torch.equal(tokens.to_dense(), grid)
    assert tokens.spatial_shape == (4, 5, 6)
    assert len(tokens) == 2
    assert tokens.offsets.tolist() == [0, int((tokens.coords[:, 0] == 0).sum()), len(tokens.coords)]
    b, x, y, z = tokens.coords.long().T
    assert torch.equal(tokens.feats, grid[b, :, x, y, z])
    torch.testing.assert_close(tokens.centers, torch.stack([x - 0.5, 2 * y + 1.0, z / 2 + 3.25], 1).float())
    feats = tokens.feats.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: SparseVoxelTokens(f, tokens.coords, (4, 5, 6), 2).to_dense(), feats)
    everything = SparseVoxelTokens.from_dense(grid, torch.ones(2, 4, 5, 6, dtype=torch.bool))
    assert len(everything.coords) == 240
    assert torch.equal(everything.to_dense(), grid)
    moved = tokens.to("meta")
    assert moved.feats.is_meta
    assert moved.voxel_size == tokens.voxel_size


def test_sparse_voxels_check_their_shapes():
    coords = torch.tensor([[1, 0, 0, 3], [0, 1, 1, 1]], dtype=torch.int32)
    feats = torch.rand(2, 3)
    good = SparseVoxelTokens(feats, coords, (2, 2, 4), 2)
    for make, message in (
        (lambda: SparseVoxelTokens(feats, coords.long(), (2, 2, 4), 2), "coords must be .* int32"),
        (lambda: SparseVoxelTokens(feats[:1], coords, (2, 2, 4), 2), r"feats must be \[2, C\]"),
        (lambda: SparseVoxelTokens(feats, coords, (2, 0, 4), 2), "three sizes of at least 1"),
        (lambda: SparseVoxelTokens(feats, coords, (2, 2, 3), 2), r"row 0 is \[1, 0, 0, 3\]"),
        (lambda: SparseVoxelTokens(feats, coords, (2, 2, 4), 1), r"row 0 is"),
        (lambda: SparseVoxelTokens(feats, coords, (2, 2, 4), 2, (1.0, 0.0, 1.0)), "voxel_size must be positive"),
        (lambda: SparseVoxelTokens.from_dense(torch.rand(2, 2, 2)), r"grid must be \[B, C, X, Y, Z\]"),
        (lambda: SparseVoxelTokens.from_dense(torch.rand(1, 1, 2, 2, 2), torch.ones(1, 2, 2, 2)), "mask must be bool"),
        (lambda: good.offsets, "sorted by batch"),
        (lambda: good.centers, "need a voxel_size"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_image_batch_checks_its_shapes():
    image = torch.rand(2, 3, 32, 48)
    batch = ImageBatch(image, image, torch.rand(2, 1, 32, 48), torch.arange(2), torch.arange(2), 2)
    assert len(batch) == 2
    assert batch.to(torch.float64).truth.dtype == torch.float64
    for wrong, message in (
        ({"image": image[0]}, r"image must be \[B, 3, H, W\], got \[3, 32, 48\]"),
        ({"reference": image[..., :32]}, "reference must be .* like image"),
        ({"truth": torch.rand(2, 32, 48)}, r"truth must be \[2, C, 32, 48\]"),
        ({"truth": torch.rand(2, 1, 32, 32)}, r"truth must be \[2, C, 32, 48\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageBatch(**{"image": image, **wrong})


def test_normalised_images_come_back():
    images = torch.rand(2, 3, 4, 5)
    normal = normalize_images(images)
    torch.testing.assert_close(denormalize_images(normal), images)
    torch.testing.assert_close(normal[:, 1], (images[:, 1] - 0.456) / 0.224)
