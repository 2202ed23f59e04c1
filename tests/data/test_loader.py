"""The loader: the same batches for any number of workers, ranks and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.cli.training import split_batch
from geossl.data import (
    FileOptions,
    FolderConfig,
    ImageSample,
    Loader,
    ObjectsConfig,
    PointCloud,
    PointDataConfig,
    PointDataset,
    Sample,
    build_loader,
    collate,
)
from geossl.data.loader import epoch_rng, sample_rng
from geossl.errors import ConfigError, DataError
from geossl.geometry import PointBatch


class Clouds(PointDataset):
    """Small clouds of different sizes; cloud ``bad`` has a NaN."""

    def __init__(self, count: int, bad: int = -1) -> None:
        super().__init__(PointDataConfig(name="clouds", points=16), np.arange(count) % 3, ["a", "b", "c"])
        self.bad = bad

    def read(self, row: int) -> PointCloud:
        coord = np.random.default_rng(row).normal(size=(10 + row % 5, 3)).astype(np.float32)
        if row == self.bad:
            coord[4, 1] = np.nan
        return PointCloud(coord)


def equal(one: PointBatch, two: PointBatch) -> bool:
    tensors = [(batch.points.coord, batch.points.offsets, batch.label, batch.index, batch.slot) for batch in (one, two)]
    return one.global_size == two.global_size and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def take(loader: Loader, count: int) -> list[PointBatch]:
    return list(islice(loader, count))


def same(one: Iterator[PointBatch] | list[PointBatch], two: list[PointBatch]) -> bool:
    return all(equal(a, b) for a, b in zip(one, two, strict=True))


def test_collate_packs_clouds_of_different_sizes() -> None:
    samples = [Sample(np.full((n, 5), n, np.float32), label=n, index=10 + n) for n in (3, 1, 2)]
    batch = collate(samples)
    assert batch.points.offsets.tolist() == [0, 3, 4, 6]
    assert batch.points.coord.tolist() == [[3.0] * 3] * 3 + [[1.0] * 3] + [[2.0] * 3] * 2
    assert batch.points.feats is not None
    assert batch.points.feats.shape == (6, 2)
    assert batch.label.tolist() == [3, 1, 2]
    assert batch.index.tolist() == [13, 11, 12]
    assert batch.slot is None


def test_collate_refuses_nothing_and_mixed_columns() -> None:
    with pytest.raises(DataError, match="no samples"):
        collate([])
    with pytest.raises(DataError, match=r"equal columns, got \[3, 6\]"):
        collate([Sample(np.zeros((2, width), np.float32), 0, 0) for width in (3, 6)])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_change_the_batches(context: str) -> None:
    dataset = Clouds(20)
    alone = take(build_loader(dataset, 6, seed=3), 8)  # more than two epochs of three batches
    loader = build_loader(dataset, 6, seed=3, workers=2, context=context, prefetch=3)
    assert same(take(loader, 8), alone)
    loader.close()


def test_a_sample_depends_on_seed_epoch_and_row_alone() -> None:
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random()
    draws = {sample_rng(*key).random() for key in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 3, 2), (2, 1, 3)]}
    assert len(draws) == 6
    small, large = (build_loader(ObjectsConfig(points=32).build("test"), size, seed=9, shuffle=False) for size in (4, 8))
    assert torch.equal(torch.cat([next(small).points.coord, next(small).points.coord]), next(large).points.coord)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(4, 25), size=st.integers(1, 3), world=st.integers(1, 3), accumulate=st.integers(1, 3), seed=st.integers(0, 1000))
def test_the_parts_of_all_ranks_are_the_batch_of_one_process(count: int, size: int, world: int, accumulate: int, seed: int) -> None:
    total = size * world * accumulate
    if total > count:
        return
    dataset = Clouds(count)
    whole = build_loader(dataset, total, seed=seed)
    ranks = [build_loader(dataset, total, seed=seed, rank=rank, world_size=world, accumulate=accumulate) for rank in range(world)]
    for _ in range(2 * whole.batches_per_epoch):
        batch, parts = next(whole), [next(loader) for loader in ranks for _ in range(accumulate)]
        assert [part.global_size for part in parts] == [total] * len(parts)
        assert torch.cat([part.slot for part in parts]).tolist() == list(range(total)) == batch.slot.tolist()
        assert torch.equal(torch.cat([part.points.coord for part in parts]), batch.points.coord)
        assert torch.equal(torch.cat([part.label for part in parts]), batch.label)
    assert [loader.epoch for loader in ranks] == [2] * world
    assert {loader.batches_per_epoch for loader in ranks} == {whole.batches_per_epoch}


def test_a_position_can_be_restored_with_other_micro_batches() -> None:
    expected = take(build_loader(Clouds(20), 6, seed=3), 7)
    loader = build_loader(Clouds(20), 6, seed=3, accumulate=3)
    take(loader, 5 * 3)
    restored = build_loader(Clouds(20), 6, seed=3)
    restored.load_state_dict(loader.state_dict())
    assert same(take(restored, 2), expected[5:])
    assert next(loader).slot.tolist() == [0, 1]
    middle = build_loader(Clouds(20), 6, seed=3, accumulate=3)
    middle.load_state_dict(loader.state_dict())
    assert next(middle).slot.tolist() == [2, 3]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 30), size=st.integers(1, 10), seed=st.integers(0, 1000))
def test_an_epoch_visits_every_row_once(count: int, size: int, seed: int) -> None:
    loader = build_loader(Clouds(count), size, seed=seed, drop_last=False)
    first, second = ([row for _ in range(loader.batches_per_epoch) for row in next(loader).index.tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first == epoch_rng(seed, 0).permutation(count).tolist()
    assert loader.epoch == 2


def test_epochs_differ_in_order_and_in_augmentation() -> None:
    loader = build_loader(Clouds(12), 12, seed=0)
    first, second = take(loader, 2)
    assert first.index.tolist() != second.index.tolist()
    row = first.index.tolist().index(4), second.index.tolist().index(4)
    clouds = [
        batch.points.coord[batch.points.offsets[i] : batch.points.offsets[i + 1]] for batch, i in zip((first, second), row, strict=True)
    ]
    assert clouds[0].shape == clouds[1].shape
    assert not torch.equal(*clouds)


def test_evaluation_order_is_the_order_of_the_rows_without_augmentation() -> None:
    dataset = Clouds(7)
    batches = list(build_loader(dataset, 3, seed=5, shuffle=False, drop_last=False, augment=False).one_pass())
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.global_size for batch in batches] == [3, 3, 1]
    assert torch.equal(batches[2].points.coord, torch.from_numpy(dataset.get(6, None).points))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_continues_where_the_consumer_was(workers: int) -> None:
    dataset = Clouds(20)
    expected = take(build_loader(dataset, 6, seed=3), 9)
    loader = build_loader(dataset, 6, seed=3, workers=workers, prefetch=4)
    take(loader, 5)  # the workers are ahead by up to eight batches
    state = loader.state_dict()
    assert state["step"] == 5
    loader.close()
    for other in (0, 1):
        restored = build_loader(dataset, 6, seed=3, workers=other)
        restored.load_state_dict(state)
        assert restored.epoch == 1
        assert same(take(restored, 4), expected[5:])
        restored.close()
    take(loader, 1)
    loader.load_state_dict(state)  # backwards, on a running loader
    assert same(take(loader, 4), expected[5:])
    loader.close()


def test_a_restored_loader_refuses_other_data() -> None:
    state = build_loader(Clouds(20), 6, seed=3).state_dict()
    for loader in (build_loader(Clouds(21), 6, seed=3), build_loader(Clouds(20), 5, seed=3), build_loader(Clouds(20), 6, seed=4)):
        with pytest.raises(ConfigError, match="cannot be restored"):
            loader.load_state_dict(state)


def test_loading_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    loader = build_loader(Clouds(20), 6, seed=3, workers=1)
    take(loader, 4)
    loader.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_one_pass_does_not_move_the_loader() -> None:
    loader = build_loader(Clouds(9), 3, seed=0)
    first = take(loader, 1)[0]
    assert equal(next(iter(loader.one_pass())), first)
    assert loader.position == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_cloud_is_one_clear_error_and_the_position_stays(workers: int) -> None:
    loader = build_loader(Clouds(9, bad=7), 3, seed=0, workers=workers, shuffle=False)
    assert len(take(loader, 2)) == 2
    for _ in range(2):
        with pytest.raises(DataError, match=r"^clouds\[7\]: coord row 4 \(from 0\) is not finite") as caught:
            next(loader)
        assert "Traceback" not in str(caught.value)
    assert loader.position == 2
    loader.close()


def test_a_cloud_of_one_point_is_named() -> None:
    class OnePoint(Clouds):
        def read(self, row: int) -> PointCloud:
            return PointCloud(np.zeros((row, 3), np.float32))

    for row in (0, 1):
        with pytest.raises(DataError, match=rf"clouds\[{row}\]: a point cloud needs at least 2 points, got {row}"):
            OnePoint(3).get(row)
    with pytest.raises(IndexError, match=r"row 3 is outside 0\.\.2"):
        OnePoint(3).get(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 30}, "batch_size must not be more than the data set's 20 samples"),
        ({"batch_size": 5, "world_size": 2}, "batch_size must divide by 2 processes x 1 micro-batches"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size must divide by 1 processes x 4 micro-batches"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"workers": -1}, "workers must not be negative"),
        ({"drop_last": False, "world_size": 2}, "drop_last must be True"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loader(Clouds(20), **{"batch_size": 4, "seed": 0, **arguments})


def test_clouds_smaller_than_a_sample_are_used_whole(tmp_path: Path, rng: np.random.Generator) -> None:
    for count in (5, 40):
        np.save(tmp_path / f"{count}.npy", rng.normal(size=(count, 3)))
    dataset = FolderConfig(root=tmp_path, points=20, files=FileOptions(test_fraction=0.0)).build("train")
    batch = next(build_loader(dataset, 2, seed=0, shuffle=False))
    assert batch.points.lengths.tolist() == [20, 5]


def test_images_are_collated_into_image_batches():
    samples = [ImageSample(torch.rand(3, 16, 32), row, torch.rand(3, 16, 32), torch.rand(1, 16, 32)) for row in range(3)]
    batch = collate(samples)
    assert torch.equal(batch.image[1], samples[1].image)
    assert torch.equal(batch.reference[2], samples[2].reference)
    assert torch.equal(batch.truth[0], samples[0].truth)
    assert batch.index.tolist() == [0, 1, 2]
    assert collate([samples[0], replace(samples[1], truth=None)]).truth is None
    with pytest.raises(DataError, match="equal sizes"):
        collate([samples[0], ImageSample(torch.rand(3, 32, 32), 3)])
    assert batch.motion is None
    motions = torch.rand(3, 4, 4)
    batch = collate([replace(sample, motion=motion) for sample, motion in zip(samples, motions, strict=True)])
    assert torch.equal(batch.motion, motions)
    first, second = split_batch(batch, 2)
    assert torch.equal(torch.cat([first.motion, second.motion]), motions)
    assert torch.equal(torch.cat([first.image, second.image]), batch.image)
    assert first.slot.tolist() == [0]
    assert second.slot.tolist() == [1, 2]
    assert second.global_size == 3
