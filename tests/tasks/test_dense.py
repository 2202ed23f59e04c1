from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import geossl
from geossl.errors import ConfigError, UnknownNameError
from geossl.geometry import ImageBatch
from geossl.layers.dense_errors import CHANNELS
from geossl.models import CroCoDecoderConfig, CroCoPair, CroCoViTConfig
from geossl.tasks import TASKS, Dense, load_task, save_task

SMALL = {"hooks": (0, 1, 2, 3), "layer_dims": (4, 6, 8, 10), "feature_dim": 8, "last_dim": 4}
DECODER = CroCoDecoderConfig(dim=24, depth=2, heads=2)
INF = float("inf")


def config(kind: str, **changes: Any) -> Any:
    pair = {"decoder": DECODER, "window": (32, 64)} if kind in ("stereo", "flow") else {}
    return dataclasses.replace(TASKS.config(kind), **{**SMALL, **pair, **changes})


def backbone(depth: int = 2, **changes: Any) -> Any:
    return CroCoViTConfig(name="croco_vit_tiny", image_size=(32, 64), dim=24, depth=depth, heads=2, **changes).build()


def make(kind: str, **changes: Any) -> Dense:
    return config(kind, **changes).build(backbone(2 if kind in ("stereo", "flow") else 4))


def batch(kind: str, samples: int = 2, height: int = 32, width: int = 64) -> ImageBatch:
    image, reference = torch.randn(2, samples, 3, height, width)
    truth = torch.rand(samples, CHANNELS[kind], height, width) + 0.5
    return ImageBatch(image, reference if kind in ("stereo", "flow") else None, truth)


@pytest.mark.parametrize("head", ["dpt", "linear"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_every_task_learns_a_batch(kind: str, head: str) -> None:
    module, data = make(kind, head=head), batch(kind)
    assert data.truth is not None
    data.truth[:, :, :4] = INF
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        output = module(data)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(value.grad is not None for value in module.parameters() if value.requires_grad), "a process would wait for it"
        optimizer.step()
        losses.append(float(output.loss))
    assert losses[-1] < 0.8 * losses[0]
    assert output.aux["values"].shape == data.truth.shape
    assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_batch_without_truth_has_no_loss_and_no_gradient(kind: str) -> None:
    module, data = make(kind), batch(kind)
    assert data.truth is not None
    data.truth.fill_(INF)
    output = module(data)
    output.loss.backward()
    assert output.loss == 0
    assert all((value.grad == 0).all() for value in module.parameters() if value.requires_grad)


def test_the_second_image_matters_for_pairs_alone() -> None:
    for kind in ("stereo", "flow"):
        module, data = make(kind).eval(), batch(kind)
        swapped = data.reference.flip(0)  # type: ignore[union-attr]
        assert (module.output(data.image, data.reference) - module.output(data.image, swapped)).abs().max() > 1e-4


def test_what_the_output_stands_for() -> None:
    depth, normals = make("depth").eval(), make("normals").eval()
    image = batch("depth").image
    torch.testing.assert_close(depth.predict(image).values, depth.output(image).exp())
    torch.testing.assert_close(normals.predict(image).values.norm(dim=1), torch.ones(2, 32, 64))
    assert depth.predict(image).confidence is None


def test_windows_or_at_once() -> None:
    module, data = make("stereo").eval(), batch("stereo", height=40, width=70)
    windows = module.predict(data.image, data.reference)
    assert windows.values.shape == (2, 1, 40, 70)
    assert windows.confidence is not None
    assert windows.confidence.shape == (2, 40, 70)
    module.config = dataclasses.replace(module.config, window=None)
    seen = []
    module.head.register_forward_hook(lambda head, given, output: seen.append(tuple(output.shape[2:])))
    whole = module.predict(data.image, data.reference)
    assert seen == [(64, 96)]
    assert whole.values.shape == (2, 1, 40, 70)
    large = batch("stereo", height=64, width=96)
    torch.testing.assert_close(
        module.predict(large.image, large.reference).values, module.output(large.image, large.reference)[:, :1], rtol=0, atol=0
    )


def test_lengths_follow_the_size_of_images_predicted_at_once() -> None:
    module = make("flow", window=None).eval()
    constant = torch.tensor([6.0, 12.0, 0.5]).view(1, 3, 1, 1)
    module.output = lambda image, reference: constant.expand(len(image), 3, *image.shape[2:])  # type: ignore[method-assign]
    image = torch.randn(1, 3, 40, 64)  # becomes 64 x 64
    torch.testing.assert_close(module.predict(image, image).values[0, :, 0, 0], torch.tensor([6.0, 12.0 * 40 / 64]))


@pytest.mark.parametrize("window", [None, (64, 64)])
def test_resized_depths_stay_positive_and_normals_unit(window: tuple[int, int] | None) -> None:
    image = torch.randn(1, 3, 50, 70)
    for kind in ("depth", "normals"):
        module = make(kind, head="linear", window=window)
        torch.nn.init.normal_(module.head.predict.weight)  # type: ignore[union-attr]  # edges as sharp as they get
        values = module.predict(image).values
        assert values.shape == (1, CHANNELS[kind], 50, 70)
        if kind == "depth":
            assert float(values.min()) > 0
        else:
            torch.testing.assert_close(values.norm(dim=1), torch.ones(1, 50, 70))


def test_hooks_on_the_encoder_alone_leave_nothing_untrained_that_trains() -> None:
    module = config("depth", hooks=(0, 1, 1, 2)).build(backbone(4))
    frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"blocks", "norm"}
    module(batch("depth")).loss.backward()
    assert all((value.grad is not None) == value.requires_grad for value in module.parameters())


def test_the_last_block_is_read_normalised_and_the_others_are_not() -> None:
    module = make("depth").eval()
    image = batch("depth").image
    seen: list[list[Tensor]] = []
    module.head.register_forward_hook(lambda head, given, output: seen.append(given[0]))
    module.output(image)
    final, raw = module.body.forward_intermediates(image, None, norm=False)  # type: ignore[operator]
    for found, expected in zip(seen[0], [*raw[:3], final], strict=True):
        torch.testing.assert_close(found, expected)


def test_a_frozen_body_stays_as_it_is() -> None:
    module = make("stereo", freeze=True).train()
    assert not module.body.training
    assert module.head.training
    module(batch("stereo")).loss.backward()
    assert all(value.grad is None for value in module.body.parameters())
    assert all(value.grad is not None for value in module.head.parameters())


def test_a_pair_keeps_its_decoder() -> None:
    encoder = backbone()
    decoder = CroCoDecoderConfig(dim=12, depth=3, heads=1).build(encoder.config)
    module = config("stereo", hooks=()).build(CroCoPair(encoder, decoder))
    assert module.body.decoder is decoder
    assert module.config.hooks == (1, 2, 3, 4)


def test_layers_from_input_to_output() -> None:
    module = make("flow")
    names = [name for name, _ in module.named_parameters()]
    groups = module.layer_groups()
    assert all(sum(name.startswith(tuple(prefixes)) for prefixes in groups) == 1 for name in names)
    assert [groups[0], groups[-1]] == [["body.backbone.patch_embed."], ["head."]]
    assert len(groups) == 1 + 2 + 2 + 1


@pytest.mark.parametrize("kind", CHANNELS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    module, data = make(kind).eval(), batch(kind)
    geossl.models.save_backbone(module.backbone, tmp_path)
    save_task(module, [], tmp_path)
    loaded: Any = load_task(tmp_path)
    assert loaded.config == module.config
    torch.testing.assert_close(loaded.output(data.image, data.reference), module.output(data.image, data.reference), rtol=0, atol=0)


def test_bfloat16_predictions_are_near_and_gradients_flow() -> None:
    module, data = make("stereo"), batch("stereo")
    exact = module(data).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = module(data)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.1)
    output.loss.backward()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "laplacian_bound"}, "did you mean 'laplacian_bounded'"),
        ({"loss": "cosine"}, "unknown loss of task stereo"),
        ({"head": "dtp"}, "did you mean 'dpt'"),
        ({"hooks": (1, 2)}, "hooks must be four blocks"),
        ({"window": (48, 64)}, "multiples of 32"),
        ({"tile_weighting": "sure"}, "expsigmoid_<beta>_<scale>"),
        ({"overlap": 1.0}, r"overlap must lie in \[0, 1\)"),
        ({"feature_dim": 7}, "feature_dim must be even"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=words):
        config("stereo", **changes)


def test_what_does_not_fit_the_backbone() -> None:
    with pytest.raises(ConfigError, match=r"hooks: block 4 does not exist; there are 4 in encoder and decoder \(0..3"):
        make("stereo", hooks=(0, 1, 2, 4))
    with pytest.raises(ConfigError, match=r"at least one must be of the decoder \(2..3\)"):
        make("stereo", hooks=(0, 0, 1, 1))
    with pytest.raises(ConfigError, match="with 2 blocks in the encoder and 0 in the decoder, four must be named"):
        config("depth", hooks=()).build(backbone(2))
    with pytest.raises(ConfigError, match="made for patches of 16 pixels, the backbone has 8"):
        config("depth").build(backbone(4, patch=8))
    with pytest.raises(ConfigError, match=r"needs a croco_vit_\* backbone, got Linear"):
        config("stereo").build(torch.nn.Linear(2, 2))


def test_wrong_batches() -> None:
    module, data = make("stereo"), batch("stereo")
    with pytest.raises(ValueError, match=r"batch.truth must be \[B, 1, H, W\], got none"):
        module(dataclasses.replace(data, truth=None))
    with pytest.raises(ValueError, match=r"batch.truth must be \[B, 1, H, W\], got \[2, 3, 32, 64\]"):
        module(dataclasses.replace(data, truth=data.image))
    with pytest.raises(ValueError, match="needs two images"):
        module(dataclasses.replace(data, reference=None))
    with pytest.raises(ValueError, match="multiples of 32, got 48 x 64"):
        module(batch("stereo", height=48))
    bad = data.image.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="image has 1 values that are not finite"):
        module.predict(bad, data.reference)
