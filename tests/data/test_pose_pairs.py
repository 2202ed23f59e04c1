from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from geossl.data import DATASETS, PosePairsConfig, collate
from geossl.errors import ConfigError, DataError
from geossl.evaluation import evaluate_poses
from geossl.geometry import euler_to_matrix, invert_pose, pose_matrix


def write_sequence(folder: Path, frames: int, seed: int) -> torch.Tensor:
    """Write a sequence in the layout of 7-Scenes; returns its poses, camera to world."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    angles, places = torch.from_numpy(rng.normal(size=(2, frames, 3)))
    poses = pose_matrix(euler_to_matrix(angles), places)
    for number, pose in enumerate(poses):
        stem = folder / f"frame-{number:06d}"
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(f"{stem}.color.png")
        np.savetxt(f"{stem}.pose.txt", pose.numpy())
    return poses


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    root = tmp_path / "chess"
    poses = {f"seq-{number:02d}": write_sequence(root / f"seq-{number:02d}", 6, number) for number in (1, 2, 3)}
    (root / "TrainSplit.txt").write_text("sequence1\nsequence2\n")
    (root / "TestSplit.txt").write_text("sequence3\n")
    return root, poses


def config(root: Path, **changes: object) -> PosePairsConfig:
    return PosePairsConfig(**{"root": root, "height": 16, "width": 32, "gap": 2, "step": 2, **changes})  # type: ignore[arg-type]


def test_motion_takes_points_from_the_first_camera_to_the_second(scene: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, poses = scene
    sample = config(root).build("test").get(1)  # frames 2 and 4 of sequence 3
    point = torch.tensor([0.3, -0.2, 2.0, 1.0], dtype=torch.float64)
    world = poses["seq-03"][2] @ point
    assert sample.motion is not None
    torch.testing.assert_close(sample.motion.double() @ point, invert_pose(poses["seq-03"][4]) @ world, rtol=0, atol=1e-5)
    assert sample.image.shape == (3, 16, 32)
    batch = collate([sample, sample])
    assert batch.motion.shape == (2, 4, 4)
    assert batch.truth is None


def test_parts_and_chains(scene: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, _ = scene
    train, test = config(root).build("train"), config(root).build("test")
    assert (len(train), len(test)) == (12, 2)
    assert [chain.tolist() for chain in test.chains] == [[0, 1]]
    assert "frame-000000 and frame-000002" in test.source(0)
    alone = config(root / "seq-01").build("test")  # one folder is every part
    assert len(alone) == 2


def test_second_frames_are_drawn_near_and_never_the_same(scene: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, poses = scene
    data = config(root).build("train")
    found = set()
    for seed in range(30):
        motion = data.get(3, np.random.default_rng(seed)).motion
        true = [(invert_pose(other) @ poses["seq-01"][3]).float() for other in poses["seq-01"]]
        found.add(int(np.argmin([float((motion - other).abs().max()) for other in true])))
    assert found == {1, 2, 4, 5}
    one, same = (data.get(3, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(one.image, same.image)
    assert torch.equal(one.reference, same.reference)


def test_true_motions_score_perfectly(scene: tuple[Path, dict[str, torch.Tensor]]) -> None:
    data = config(scene[0]).build("test")

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.motions = [data.get(row).motion for row in range(len(data))]
            self.wrong = torch.eye(4)

        def predict(self, image: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return self.wrong @ torch.stack(self.motions)  # type: ignore[arg-type]

    oracle = Oracle()
    scores = evaluate_poses(oracle, data)
    assert scores == pytest.approx({"median_translation": 0, "median_rotation": 0, "ate": 0}, abs=1e-4)
    oracle.wrong = pose_matrix(torch.eye(3), torch.tensor([0.5, 0.0, 0.0]))
    scores = evaluate_poses(oracle, data)
    assert scores["median_translation"] == pytest.approx(0.5, abs=1e-5)
    assert scores["ate"] > 0.01


def test_wrong_input(scene: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    root, _ = scene
    with pytest.raises(DataError, match="unknown split 'val'; choose one of train, test"):
        config(root).build("val")
    with pytest.raises(DataError, match="no two frames 9 apart"):
        config(root, step=9).build("test")
    (root / "TestSplit.txt").write_text("third sequence\n")
    with pytest.raises(DataError, match="expected a line such as 'sequence1'"):
        config(root).build("test")
    with pytest.raises(ConfigError, match="gap must be at least 1"):
        config(root, gap=0)
    assert DATASETS.config("pose_pairs").name == "pose_pairs"


def test_a_damaged_frame_is_skipped_in_training_and_stops_a_trajectory(scene: tuple[Path, dict[str, torch.Tensor]]) -> None:
    root, _ = scene
    train = config(root).build("train")
    broken = train.sequences[0].files(0)[0]
    broken.write_bytes(b"no image")
    sample = train.get(0, None)
    assert sample.index > 0
    assert broken.name in train.unusable[0]
    with pytest.raises(DataError, match=re.escape(broken.name)):
        config(root, damaged="error").build("train").get(0, None)
    test = config(root).build("test")
    test.sequences[0].files(0)[0].write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        test.get(0, None)


def test_the_motion_of_rendered_pairs(tmp_path: Path) -> None:
    from geossl.data.room_pairs import RoomPairsConfig

    rooms = RoomPairsConfig(rooms=1, pairs_per_room=1, size=32, crop=32, truth="motion", cache=tmp_path)
    sample = rooms.build("train").get(0)
    assert sample.motion is not None
    assert sample.truth is None
    torch.testing.assert_close(sample.motion[:3, :3] @ sample.motion[:3, :3].T, torch.eye(3), rtol=0, atol=1e-5)
    assert sample.motion[:3, 3].norm() > 0.01
