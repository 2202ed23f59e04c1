"""Sparse voxel tokens and their exchange with spconv, real where it is installed and a stand-in for its order of axes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from geossl.adapters import from_spconv, to_spconv
from geossl.errors import MissingDependencyError
from geossl.geometry import SparseVoxelTokens


def tokens() -> SparseVoxelTokens:
    coords = torch.tensor([[0, 1, 2, 3], [0, 4, 0, 1], [1, 0, 5, 6]], dtype=torch.int32)
    return SparseVoxelTokens(torch.arange(6.0).view(3, 2), coords, (5, 6, 7), 2, (0.5, 1.0, 2.0), (10.0, 0.0, -1.0))


def check_round_trip() -> None:
    given = tokens()
    tensor = to_spconv(given)
    assert tensor.indices.tolist() == [[0, 3, 2, 1], [0, 1, 0, 4], [1, 6, 5, 0]]
    assert tensor.indices.dtype == torch.int32
    assert list(tensor.spatial_shape) == [7, 6, 5]
    assert tensor.batch_size == 2
    back = from_spconv(tensor, given.voxel_size, given.origin)
    assert torch.equal(back.coords, given.coords)
    assert torch.equal(back.feats, given.feats)
    assert (back.spatial_shape, back.batch_size, back.voxel_size, back.origin) == ((5, 6, 7), 2, given.voxel_size, given.origin)


def test_axes_are_turned_for_spconv(monkeypatch):
    module = ModuleType("spconv.pytorch")
    module.SparseConvTensor = lambda features, indices, shape, size: SimpleNamespace(
        features=features, indices=indices, spatial_shape=shape, batch_size=size
    )
    monkeypatch.setitem(sys.modules, "spconv", ModuleType("spconv"))
    monkeypatch.setitem(sys.modules, "spconv.pytorch", module)
    check_round_trip()


def test_real_spconv():
    spconv = pytest.importorskip("spconv.pytorch")
    check_round_trip()
    given = tokens()
    torch.testing.assert_close(to_spconv(given).dense(), given.to_dense().permute(0, 1, 4, 3, 2))
    assert isinstance(to_spconv(given), spconv.SparseConvTensor)


def test_without_spconv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    with pytest.raises(MissingDependencyError, match="interop"):
        to_spconv(tokens())
