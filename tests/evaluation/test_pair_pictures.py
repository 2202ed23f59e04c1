"""Features as colours, and matches as lines."""

from __future__ import annotations

import numpy as np
import torch

from geossl.evaluation.correspondence import Matches
from geossl.evaluation.pair_pictures import add_pair_pictures, draw_matches, feature_colors
from geossl.geometry import ImageBatch
from geossl.methods import CroCoConfig
from geossl.models import CroCoDecoderConfig, create_backbone


def test_equal_features_have_equal_colors():
    maps = torch.randn(2, 5, 2, 3)
    maps[1, :, 0, 0] = maps[0, :, 1, 2]
    colors = feature_colors(maps, 4)
    assert colors.shape == (2, 8, 12, 3)
    assert (colors[0, 4:, 8:] == colors[1, 0, 0]).all()
    assert np.unique(colors.reshape(-1, 3), axis=0).shape[0] == 11
    assert colors.min() >= 0
    assert colors.max() <= 1


def test_lines_lead_from_one_image_to_the_other():
    black = np.zeros((112, 112, 3), np.float32)
    place = torch.tensor([[10.0, 20.0], [100.0, 90.0]])
    drawn = draw_matches(black, black, Matches(place, place, torch.tensor([0.9, 0.1])), lines=1)
    assert drawn.shape == (224, 448, 3)  # small images are enlarged
    assert drawn[40, 20].max() > 0.9
    assert drawn[40, 20 + 224].max() > 0.9
    assert drawn[40, 130].max() > 0.9  # on the line between them
    assert drawn[180, 200].max() == 0  # the weaker match is not drawn


def test_pictures_of_a_method():
    torch.manual_seed(0)
    backbone = create_backbone("croco_vit_tiny", dim=16, depth=1, heads=2, image_size=(32, 32))
    batch = ImageBatch(torch.randn(2, 3, 32, 48), torch.randn(2, 3, 32, 48))
    for single_view in (False, True):
        method = CroCoConfig(decoder=CroCoDecoderConfig(dim=16, depth=1, heads=2), single_view=single_view).build(backbone).eval()
        made = method.pictures(batch, generator=torch.Generator().manual_seed(0))
        add_pair_pictures(method, batch, made)
        assert made[1]["features"].shape == (32, 48, 3)
        assert ("matches" in made[0]) is not single_view
