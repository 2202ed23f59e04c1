"""Oriented boxes."""

from __future__ import annotations

import math

import pytest
import torch

from geossl.geometry import BOX_EDGES, box_corners, points_in_boxes


def test_corners_and_edges() -> None:
    boxes = torch.tensor([[1.0, 2.0, 3.0, 4.0, 2.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0, 2.0, 1.0, math.pi / 2]])
    corners = box_corners(boxes)
    assert torch.allclose(corners[0, 0], torch.tensor([-1.0, 1.0, 2.5]))
    assert torch.allclose(corners[0, 5], torch.tensor([3.0, 1.0, 3.5]))
    assert torch.allclose(corners[1].amin(0), torch.tensor([0.0, 0.0, 2.5]), atol=1e-6)
    lengths = (corners[:, [a for a, _ in BOX_EDGES]] - corners[:, [b for _, b in BOX_EDGES]]).norm(dim=-1)
    assert torch.allclose(lengths.sort(dim=1).values, torch.tensor([1.0] * 4 + [2.0] * 4 + [4.0] * 4).expand(2, 12), atol=1e-5)


def test_points_in_boxes_follows_the_yaw() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 1.0, 1.0, math.pi / 4]])
    along = torch.tensor([[1.2, 1.2, 0.0], [1.2, -1.2, 0.0], [0.0, 0.0, 0.6]])
    assert points_in_boxes(along, boxes)[:, 0].tolist() == [True, False, False]
    assert points_in_boxes(along, boxes, margin=0.2)[:, 0].tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"boxes must be \[n, 7\]"):
        points_in_boxes(along, boxes[0])
