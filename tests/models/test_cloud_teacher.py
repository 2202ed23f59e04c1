"""A teacher that looks at clouds, and the store of its answers: used, never out of date, safe against damage."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import nn

from geossl.errors import ConfigError, DataError
from geossl.geometry import PackedPoints
from geossl.layers import back_project
from geossl.models import CloudTeacher, Teacher, TeacherConfig, TeacherPoints
from geossl.models.cloud_teacher import fixed_cloud_key

RANDOM = TeacherConfig(name="random")


class Counting(nn.Module):
    """A tower that counts the images it is shown."""

    channels = 4

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 16, 16)
        nn.init.normal_(self.conv.weight, std=scale)
        self.images = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return self.conv(images)


def counting(digest: str = "1", scale: float = 1.0) -> Teacher:
    return Teacher(Counting(scale), name="counting", channels=4, digest=digest)


def clouds(*lengths: int, seed: int = 0) -> PackedPoints:
    rows = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    return PackedPoints(rows, torch.tensor([0, *lengths]).cumsum(0))


def teacher_with(store: Path | None, teacher: Teacher | None = None, size: int = 64) -> CloudTeacher:
    made = CloudTeacher(None, store, size)
    made.use(teacher or counting())
    return made


def files(store: Path) -> list[Path]:
    return sorted(store.rglob("*.safetensors"))


def same(first, second) -> bool:
    return torch.equal(first.features, second.features) and torch.equal(first.saliency, second.saliency)


def test_answers_do_not_depend_on_the_batch():
    teacher, batch = teacher_with(None), clouds(40, 7, 25)
    for fixed in (False, True):
        together = teacher(batch, fixed=fixed)
        assert together.features.shape == (9, 4, 4, 4)
        for i, part in enumerate(batch.coord.split([40, 7, 25])):
            alone = teacher(PackedPoints.from_padded(part[None]), fixed=fixed)
            assert torch.equal(alone.features, together.features[i::3])
            assert torch.equal(alone.saliency, together.saliency[i::3])


def test_stored_answers_equal_computed_ones_and_the_teacher_is_not_asked_again(tmp_path):
    batch = clouds(40, 7)
    computed = teacher_with(None)(batch, fixed=True)
    first = teacher_with(tmp_path)
    assert same(first(batch, fixed=True), computed)
    assert len(files(tmp_path)) == 2
    second = teacher_with(tmp_path)
    shuffled = torch.cat([batch.coord[:40].flip(0), batch.coord[40:]])
    assert same(second(PackedPoints(shuffled, batch.offsets), fixed=True), computed)  # the same points in another order
    assert first.load().tower.images == 6
    assert second.load().tower.images == 0
    mixed = teacher_with(tmp_path)
    three = PackedPoints(torch.cat([clouds(9, seed=1).coord, batch.coord]), torch.tensor([0, 9, 49, 56]))
    assert same(mixed(three, fixed=True), teacher_with(None)(three, fixed=True))
    assert mixed.load().tower.images == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_store_may_be_named_by_a_string(tmp_path):
    teacher_with(str(tmp_path))(clouds(40), fixed=True)
    assert len(files(tmp_path)) == 1


def test_augmented_clouds_are_not_stored(tmp_path):
    teacher = teacher_with(tmp_path)
    teacher(clouds(40))
    assert not files(tmp_path)


def test_another_cloud_teacher_or_projection_is_another_file(tmp_path):
    batch = clouds(40)
    teacher_with(tmp_path)(batch, fixed=True)
    moved = PackedPoints(batch.coord.clone(), batch.offsets)
    moved.coord[3, 1] += 1e-6
    for teacher, seen in (
        (teacher_with(tmp_path), moved),
        (teacher_with(tmp_path, counting("2", scale=2.0)), batch),
        (teacher_with(tmp_path, Teacher(Counting(), name="counting", channels=4, digest="1", precision="bfloat16")), batch),
        (teacher_with(tmp_path, size=96), batch),
    ):
        before = len(files(tmp_path))
        teacher(seen, fixed=True)
        assert teacher.load().tower.images == 3
        assert len(files(tmp_path)) == before + 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "other content"])
def test_a_damaged_file_is_found_out_and_made_again(tmp_path, damage, caplog):
    batch = clouds(40)
    expected = teacher_with(tmp_path)(batch, fixed=True)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-5] ^= 4
    path.write_bytes({"truncated": content[:-30], "empty": b"", "a bit": content, "other content": b"x" * 400}[damage])
    again = teacher_with(tmp_path)
    with caplog.at_level(logging.WARNING, "geossl"):
        assert same(again(batch, fixed=True), expected)
    assert again.load().tower.images == 3
    assert f"{path}: damaged" in caplog.text
    after = teacher_with(tmp_path)
    assert same(after(batch, fixed=True), expected)
    assert after.load().tower.images == 0


def _fill(store: str) -> None:
    torch.set_num_threads(1)
    for _ in range(3):
        CloudTeacher(RANDOM, Path(store), 32)(clouds(40, 7, 9), fixed=True)


def test_processes_share_a_store(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(str(tmp_path),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(files(tmp_path)) == 3
    assert same(
        CloudTeacher(RANDOM, tmp_path, 32)(clouds(40, 7, 9), fixed=True), CloudTeacher(RANDOM, None, 32)(clouds(40, 7, 9), fixed=True)
    )


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    teacher = teacher_with(tmp_path / "file")
    with pytest.raises(DataError, match=r"outputs of the teacher cannot be stored here .*choose another teacher_store"):
        teacher.store.check_writable()
    with pytest.raises(DataError, match="could not be written"):
        teacher(clouds(40), fixed=True)


def test_a_teacher_that_cannot_be_told_from_others_is_not_stored(tmp_path):
    with pytest.raises(ConfigError, match="outputs of teacher 'counting' cannot be stored: it has no digest"):
        teacher_with(tmp_path, counting(digest=""))
    CloudTeacher(RANDOM, tmp_path).load()  # always the same


def test_features_beyond_half_precision_are_refused(tmp_path):
    with pytest.raises(ValueError, match="features of teacher 'counting' do not fit half precision"):
        teacher_with(tmp_path, counting("3", scale=1e5))(clouds(40), fixed=True)
    assert not files(tmp_path)


def test_keys_follow_the_points_alone():
    points = clouds(50).coord
    assert fixed_cloud_key(points) == fixed_cloud_key(points[torch.randperm(50)])
    assert fixed_cloud_key(points) != fixed_cloud_key(points[:49])
    points[:2] = 0
    negative = points.clone()
    negative[0] = -0.0
    assert fixed_cloud_key(points) == fixed_cloud_key(negative) == fixed_cloud_key(negative.flip(0))


def test_autocast_around_it_changes_nothing(tmp_path):
    batch = clouds(40)
    plain = teacher_with(tmp_path)(batch, fixed=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(teacher_with(None)(batch, fixed=True), plain)
        assert same(teacher_with(tmp_path)(batch, fixed=True), plain)


@pytest.mark.parametrize("name", ["random", "mobilenet_v2", "clip_vit_base_patch16", "clip_vit_large_patch14", "dinov2_vit_small_patch14"])
def test_channels_are_known_without_weights(name):
    expected = {
        "random": 32,
        "mobilenet_v2": 96,
        "clip_vit_base_patch16": 512,
        "clip_vit_large_patch14": 768,
        "dinov2_vit_small_patch14": 384,
    }
    weights = None if name in ("random", "mobilenet_v2") else "missing.pt"
    assert TeacherConfig(name=name, weights=weights).channels == expected[name]


def test_points_have_the_features_of_their_places_in_the_three_views():
    teacher, two = CloudTeacher(RANDOM), clouds(40, 25)
    seen = teacher(two)
    tokens = TeacherPoints(teacher)(two)
    assert tokens.feats.shape == (65, 3 * 32)
    assert torch.equal(tokens.centers, two.coord)
    assert torch.equal(tokens.offsets, two.offsets)
    per_view = seen.features.unflatten(0, (3, 2))
    alone = PackedPoints(two.coord[40:], torch.tensor([0, 25]))
    second = back_project(per_view[:, 1].contiguous(), alone, teacher(alone).frames)
    torch.testing.assert_close(tokens.feats[40:].view(25, 3, 32), second)
    with pytest.raises(ValueError, match=r"3"):
        TeacherPoints(teacher)(torch.zeros(1, 5, 6))
