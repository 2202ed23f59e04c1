"""Pictures of any source and size become maps; scenes become points with features."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import nn

from geossl.data import SceneSample
from geossl.errors import DataError
from geossl.evaluation import extract_image_features, extract_scene_features
from geossl.geometry import back_project, denormalize_images, intrinsics_from_fov, look_at

PATCH = 16


class MeanColor(nn.Module):
    """An image backbone whose first block is the mean colour of a patch, and whose last doubles it."""

    config = SimpleNamespace(patch=PATCH)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward_intermediates(self, images, indices):
        self.shapes.append(tuple(images.shape))
        mean = F.avg_pool2d(denormalize_images(images), PATCH)
        outputs = [mean * self.weight, 2 * mean * self.weight]
        return outputs[1], [outputs[i] for i in (range(2 - indices, 2) if isinstance(indices, int) else indices)]

    def forward(self, images):
        return self.forward_intermediates(images, [])[0]


@pytest.fixture
def backbone() -> MeanColor:
    return MeanColor()


def test_maps_of_a_tensor(backbone):
    images = torch.rand(3, 3, 32, 48)
    features = extract_image_features(backbone, images, batch_size=2)
    assert [shape[0] for shape in backbone.shapes] == [2, 1]
    assert features.names == ["image 0", "image 1", "image 2"]
    for number in range(3):
        torch.testing.assert_close(features.maps[number], 2 * F.avg_pool2d(images[number], PATCH))
    assert not features.maps[0].requires_grad
    several = extract_image_features(backbone, images[1], layers=[0, 1])
    torch.testing.assert_close(several.maps[0], torch.cat([0.5 * features.maps[1], features.maps[1]]))


def test_tokens_know_where_they_are_in_the_picture(backbone):
    image = torch.rand(3, 64, 36)
    features = extract_image_features(backbone, image)  # encoded at 64 x 32, the nearest multiples
    assert backbone.shapes == [(1, 3, 64, 32)]
    assert features.sizes == [(64, 36)]
    feats, places = features.tokens(0)
    assert feats.shape == (8, 3)
    torch.testing.assert_close(feats[3], features.maps[0][:, 1, 1])
    torch.testing.assert_close(places[:3], torch.tensor([[9.0, 8.0], [27.0, 8.0], [9.0, 24.0]]))
    assert extract_image_features(backbone, image, size=(16, 32)).maps[0].shape == (3, 1, 2)


def test_files_folders_and_lists(backbone, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    (tmp_path / "sub").mkdir()
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    Image.fromarray(pixels[:16, :, 0]).save(tmp_path / "a.png")  # grey, and of another size
    Image.fromarray(pixels).save(tmp_path / "sub" / "c.PNG")  # with alpha
    (tmp_path / "notes.txt").write_text("no picture")
    features = extract_image_features(backbone, tmp_path)
    assert features.names == ["a.png", "b.png", "sub/c.PNG"]
    assert features.sizes == [(16, 32), (32, 32), (32, 32)]
    torch.testing.assert_close(features.maps[1], features.maps[2])
    torch.testing.assert_close(features.maps[0][0], features.maps[0][2])
    one = extract_image_features(backbone, tmp_path / "b.png")
    assert torch.equal(one.maps[0], features.maps[1])
    listed = extract_image_features(backbone, [tmp_path / "b.png", str(tmp_path / "a.png")])
    assert torch.equal(listed.maps[1], features.maps[0])

    saved = np.load(features.save(tmp_path / "out.npz"))
    np.testing.assert_array_equal(saved["map_2"], features.maps[2].numpy())
    assert saved["sizes"].tolist() == [[16, 32], [32, 32], [32, 32]]
    with safe_open(features.save(tmp_path / "out.safetensors"), "np") as file:
        assert json.loads(file.metadata()["names"]) == features.names
        assert all(np.array_equal(file.get_tensor(f"map_{number}"), feats.numpy()) for number, feats in enumerate(features.maps))
    strided = replace(features, maps=[feats.permute(1, 2, 0).contiguous().permute(2, 0, 1) for feats in features.maps])  # as backbones give
    with safe_open(strided.save(tmp_path / "out.safetensors"), "np") as file:
        assert all(np.array_equal(file.get_tensor(f"map_{number}"), feats.numpy()) for number, feats in enumerate(features.maps))
    with pytest.raises(DataError, match=r"\.npz or \.safetensors"):
        features.save(tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.rand(4, 32, 32), "must be floating point"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "must be floating point"),
        (2 * torch.ones(3, 32, 32), r"RGB in 0\.\.1"),
        (torch.full((3, 32, 32), torch.nan), r"RGB in 0\.\.1"),
        (torch.rand(3, 8, 32), "smaller than one patch"),
        ("missing.png", "missing.png"),
        ([], "holds no picture"),
    ],
)
def test_pictures_that_cannot_be_read(backbone, source, message):
    with pytest.raises(DataError, match=message):
        extract_image_features(backbone, source)


def test_folders_without_pictures_and_wrong_sizes(backbone, tmp_path):
    with pytest.raises(DataError, match="holds no picture"):
        extract_image_features(backbone, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        extract_image_features(backbone, tmp_path)
    with pytest.raises(DataError, match="multiples of the patch"):
        extract_image_features(backbone, torch.rand(3, 32, 32), size=(20, 32))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        extract_image_features(backbone, torch.rand(3, 32, 32), batch_size=0)


def scene() -> SceneSample:
    """A wall at y = 0, in four coloured quarters, seen from two places."""
    eyes = torch.tensor([[0.0, -2.0, 0.0], [0.2, -2.0, 0.1]])
    pose = torch.stack([look_at(eye, eye + torch.tensor([0.0, 1.0, 0.0])) for eye in eyes])
    intrinsics = intrinsics_from_fov(60.0, 64, 64).expand(2, 3, 3)
    depth = torch.full((2, 64, 64), 2.0)
    places = back_project(depth, intrinsics, pose)
    color = torch.stack([(places[..., 0] > 0).float(), (places[..., 2] > 0).float(), torch.full((2, 64, 64), 0.5)], 1)
    points = torch.tensor([[0.7, 0.0, 0.7], [-0.7, 0.0, 0.7], [-0.7, 0.0, -0.7], [0.7, 0.0, -0.7], [0.7, 1.0, 0.7]])
    return SceneSample(color, intrinsics, pose, depth=depth, points=points, source="wall")


def test_points_of_a_scene_read_its_pictures(backbone):
    features = extract_scene_features(backbone, scene(), batch_size=1)
    assert features.names == ["wall"]
    # Patches of the second picture lie a little across the edges between the quarters.
    expected = 2 * torch.tensor([[1, 1, 0.5], [0, 1, 0.5], [0, 0, 0.5], [1, 0, 0.5], [0, 0, 0]])  # the last is hidden behind the wall
    torch.testing.assert_close(features.feats, expected, atol=0.03, rtol=0)
    two = extract_scene_features(backbone, [scene(), replace(scene(), points=scene().points[:2], depth=None)])
    assert two.offsets.tolist() == [0, 5, 7]
    torch.testing.assert_close(two[1][1], expected[:2], atol=0.03, rtol=0)


def test_scenes_without_points(backbone):
    with pytest.raises(DataError, match="wall: has no points"):
        extract_scene_features(backbone, replace(scene(), points=None))
    with pytest.raises(DataError, match="got no scene"):
        extract_scene_features(backbone, [])
