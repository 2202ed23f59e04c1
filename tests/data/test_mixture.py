from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from geossl.config import from_dict, to_yaml
from geossl.data import DATASETS, MixtureConfig, PairsConfig, StereoDataConfig, build_loader
from geossl.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Two lists of stereo pairs: 2 with disparity 3 and 1 with disparity 5."""
    folder = tmp_path_factory.mktemp("stereo")
    for name, count, disparity in (("a", 2, 3.0), ("b", 1, 5.0)):
        lines = []
        for number in range(count):
            for side in "lr":
                pixels = np.random.default_rng(number).integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}{number}{side}.png")
            np.save(folder / f"{name}{number}.npy", np.full((40, 48), disparity))
            lines.append(f"{name}{number}l.png {name}{number}r.png {name}{number}.npy")
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def parts(folder):
    return tuple(StereoDataConfig(layout="list", root=folder / f"{name}.txt", crop=(32, 32)) for name in "ab")


def test_an_epoch_visits_each_part_as_often_as_asked(lists):
    config = MixtureConfig(parts=parts(lists), times=(1, 3))
    data = config.build("train")
    assert len(data) == 5
    samples = [data.get(row) for row in range(5)]
    assert [sample.index for sample in samples] == list(range(5))
    assert [sample.truth[0, 0, 0].item() for sample in samples] == [3.0, 3.0, 5.0, 5.0, 5.0]
    assert torch.equal(samples[2].image, data.parts[1].get(0).image)
    assert data.source(4).endswith("b0l.png")
    assert [len(config.build(split)) for split in ("test", "all")] == [0, 5]  # lists hold nothing out
    first = next(build_loader(data, 5, seed=0))
    assert sorted(first.index.tolist()) == list(range(5))
    repeated = first.image[first.index >= 2]
    assert not any(torch.equal(repeated[i], repeated[j]) for i, j in ((0, 1), (0, 2), (1, 2)))  # other windows and colours
    with pytest.raises(IndexError, match=r"row 5 is outside 0\.\.4"):
        data.get(5)


def test_without_times_each_part_is_visited_once(lists):
    assert len(MixtureConfig(parts=parts(lists)).build("train")) == 3


def test_configuration_round_trips(lists):
    config = MixtureConfig(parts=parts(lists), times=(1, 3))
    assert from_dict(MixtureConfig, yaml.safe_load(to_yaml(config))) == config
    assert "stereo of list, windows of 32 x 32 pixels; " in config.describe()


def test_bad_mixtures_are_refused(lists):
    with pytest.raises(ConfigError, match="times must have a number for each of the 2 parts"):
        MixtureConfig(parts=parts(lists), times=(1,))
    with pytest.raises(ConfigError, match="times must be at least 1"):
        MixtureConfig(parts=parts(lists), times=(1, 0))
    with pytest.raises(ConfigError, match=r"parts must give images of one size.*\[\(32, 32\), \(48, 48\)\]"):
        MixtureConfig(parts=(parts(lists)[0], PairsConfig(crop=48)))
    with pytest.raises(DataError, match=r"data\.parts names no data sets"):
        MixtureConfig().build()
    with pytest.raises(DataError, match=r"parts\[1\], objects, gives \('xyz',\), but parts\[0\], stereo, gives \('rgb',\)"):
        MixtureConfig(parts=(parts(lists)[0], DATASETS.config("objects"))).build()


def test_pairs_of_several_folders_train_together(lists):
    (lists / "pairs.txt").write_text("a0l.png a0r.png\n")
    one = PairsConfig(root=lists / "pairs.txt", crop=16, resize=None)
    data = MixtureConfig(parts=(one, one), times=(2, 1)).build()
    assert next(build_loader(data, 3, seed=0)).reference.shape == (3, 3, 16, 16)


def test_png_of_lists_are_read_with_the_scale_that_is_given(tmp_path):
    for side in "lr":
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"{side}.png")
    Image.fromarray(np.full((16, 16), 640, np.uint16)).save(tmp_path / "d.png")
    (tmp_path / "list.txt").write_text("l.png r.png d.png")
    for scale, expected in ((None, 2.5), (32.0, 20.0)):
        config = StereoDataConfig(layout="list", root=tmp_path / "list.txt", crop=(16, 16), png_scale=scale)
        assert config.build().get(0).truth.unique().tolist() == [expected]
    with pytest.raises(ConfigError, match="png_scale must be positive"):
        StereoDataConfig(png_scale=0.0)
