from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import geossl
from geossl.evaluation.trajectory import pose_errors
from geossl.geometry import ImageBatch, euler_to_matrix, pose_matrix, rotation_from_columns
from geossl.models import CroCoDecoderConfig, CroCoViTConfig
from geossl.tasks import RelativePoseConfig, load_task, save_task


def make(**changes: Any) -> Any:
    config = RelativePoseConfig(hidden=32, decoder=CroCoDecoderConfig(dim=24, depth=2, heads=2), **changes)
    return config.build(CroCoViTConfig(name="croco_vit_tiny", image_size=(32, 48), dim=24, depth=2, heads=2).build())


def batch(samples: int = 4) -> ImageBatch:
    image, reference = torch.randn(2, samples, 3, 32, 48)
    motion = pose_matrix(euler_to_matrix(0.5 * torch.randn(samples, 3)), torch.randn(samples, 3))
    return ImageBatch(image, reference, motion=motion)


def test_columns_make_a_rotation() -> None:
    matrix = rotation_from_columns(torch.randn(100, 6, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3, dtype=torch.float64).expand(100, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(100, dtype=torch.float64))
    rotation = euler_to_matrix(torch.randn(5, 3))
    torch.testing.assert_close(rotation_from_columns(rotation[:, :, :2].mT.flatten(1)), rotation)


def test_it_starts_near_no_motion_and_learns() -> None:
    module, data = make(), batch()
    start = module.predict(data.image, data.reference)
    assert (start - torch.eye(4)).abs().max() < 0.3
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(60):
        output = module(data)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(value.grad is not None for value in module.parameters())
        optimizer.step()
    assert output.loss < 0.5 * (pose_errors(start, data.motion).translation.mean())  # type: ignore[arg-type]


def test_metrics_are_those_of_the_evaluation() -> None:
    module, data = make(), batch()
    output = module(data)
    found = pose_errors(output.aux["motion"], data.motion)  # type: ignore[arg-type]
    assert output.metrics["translation_error"].item() == pytest.approx(found.translation.mean(), abs=1e-5)
    assert output.metrics["rotation_error"].item() == pytest.approx(found.rotation.mean(), abs=1e-3)


def test_saved_and_loaded(tmp_path: Path) -> None:
    module, data = make().eval(), batch()
    geossl.models.save_backbone(module.backbone, tmp_path)
    save_task(module, [], tmp_path)
    loaded: Any = load_task(tmp_path)
    torch.testing.assert_close(loaded.predict(data.image, data.reference), module.predict(data.image, data.reference), rtol=0, atol=0)


def test_a_frozen_body_and_a_batch_without_motion() -> None:
    module = make(freeze=True).train()
    assert not module.body.training
    module(batch()).loss.backward()
    assert all(value.grad is None for value in module.body.parameters())
    with pytest.raises(ValueError, match="must have reference and motion"):
        module(dataclasses.replace(batch(), motion=None))
    with pytest.raises(ValueError, match=r"ImageBatch: motion must be \[4, 4, 4\]"):
        dataclasses.replace(batch(), motion=torch.eye(4))
