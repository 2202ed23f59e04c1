"""The packed mini-PointNet: equal to the published padded one, to tensors computed with it, and to its own plain definition."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from geossl.layers import PackedTokenEmbedding
from geossl.ops import offsets_from_lengths

GOLDEN = Path(os.environ.get("GEOSSL_GOLDEN", Path(__file__).parents[1] / "golden")) / "polar_mae"
NAMES = {"conv1": "first_conv.0", "norm1": "first_conv.1", "conv2": "first_conv.3", "conv3": "second_conv.0", "norm2": "second_conv.1",
         "conv4": "second_conv.3", "slot_linear": "position_encoder.time_embed.1"}  # fmt: skip


def embedding(slots: int = 5, *, columns: int = 3, empty_slots: bool = True, code: bool = False, seed: int = 0) -> PackedTokenEmbedding:
    """A small one in float64 whose batch norms are not the identity."""
    torch.manual_seed(seed)
    module = PackedTokenEmbedding(6, columns, widths=(8, 10, 14), slots=slots, empty_slots=empty_slots, slot_embedding=code)
    for norm in (module.norm1, module.norm2):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.5)
        torch.nn.init.normal_(norm.running_mean)
    return module.double().train()


def random_groups(lengths: list[int], columns: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(sum(lengths), columns, dtype=torch.float64), offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


# The published form: padded groups, empty slots computed and masked in the batch norms alone -------------------------------------------


def published(module: PackedTokenEmbedding, points: Tensor, row_splits: Tensor) -> Tensor:
    count = row_splits.diff()
    slot = torch.arange(module.slots)
    filled = slot < count[:, None]
    index = (row_splits[:-1, None] + slot.clamp(max=(count - 1)[:, None])).clamp(0, max(points.shape[0] - 1, 0))
    x = points[index]  # [G, slots, C]; empty slots repeat the last point: what they hold must not matter

    def masked_norm(norm, x):
        if norm.training:
            rows = x[filled]
            mean, variance = rows.mean(0), rows.var(0, unbiased=False)
            with torch.no_grad():
                norm.running_mean.lerp_(mean, 0.1)
                norm.running_var.lerp_(variance, 0.1)
        else:
            mean, variance = norm.running_mean, norm.running_var
        return (x - mean) / (variance + norm.eps).sqrt() * filled[..., None] * norm.weight + norm.bias

    x = module.conv2(F.relu(masked_norm(module.norm1, module.conv1(x))))
    if module.slot_linear is not None:
        x = x + F.relu(module.slot_linear(module.slot_code))
    x = torch.cat([x.max(1, keepdim=True).values.expand_as(x), x], dim=2)
    x = module.conv4(F.relu(masked_norm(module.norm2, module.conv3(x)))).max(1).values
    return torch.where(count[:, None] > 0, x, 0)


def assert_same(module: PackedTokenEmbedding, twin: PackedTokenEmbedding, grads: list[Tensor | None]) -> None:
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)
    for (name, a), (_, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("norm1", "norm2"):
        for statistic in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(getattr(module, name), statistic), getattr(getattr(twin, name), statistic))


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_published_padded_form(training, code):
    module = embedding(code=code).train(training)
    twin = copy.deepcopy(module)
    points, row_splits = random_groups([5, 1, 3, 2, 5, 4])
    mine, theirs = points.clone().requires_grad_(), points.clone().requires_grad_()
    tokens, expected = module(mine, row_splits), published(twin, theirs, row_splits)
    torch.testing.assert_close(tokens, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(tokens)
    (tokens * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same(module, twin, [mine.grad, theirs.grad])


# Tensors computed with the published implementation ------------------------------------------------------------------------------------


class Case:
    """A golden pretraining case: its groups, packed, and its embeddings with their weights."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            self.config = json.loads(file.metadata()["config"])
        filled = self.tensors["tok.point_mask"]
        self.row_splits = offsets_from_lengths(filled[self.tensors["tok.emb_mask"]].sum(1))
        self.points = self.tensors["tok.groups"][filled].float()

    def embedding(self, prefix: str, **options) -> PackedTokenEmbedding:
        slots = self.tensors["tok.groups"].shape[2]
        module = PackedTokenEmbedding(self.config["D"], slots=slots, empty_slots=True, **options)
        state = module.state_dict()
        for key in state:
            layer, _, name = key.partition(".")
            source = f"{prefix}.{NAMES[layer]}.{name}"
            if name == "num_batches_tracked":
                continue  # the published one has none
            value = (
                self.tensors[f"state.{source}"] if f"state.{source}" in self.tensors else self.tensors[f"state_x16.{source}"].float() / 16
            )
            state[key] = value.float().reshape(state[key].shape)
        module.load_state_dict(state)
        return module


def golden_cases(*needed: str) -> pytest.MarkDecorator:
    """Run a test on every golden case with these tensors."""
    found = []
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if {"tok.groups", *needed} <= set(file.keys()):
                found.append(path)
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


@golden_cases("tok.tokens")
def test_tokens_are_the_published_ones(path):
    case = Case(path)
    module = case.embedding("encoder.tokenizer.embedding", in_channels=4).eval()
    close = {"atol": 2e-5, "rtol": 1e-4}
    expected = case.tensors["tok.tokens"][case.tensors["tok.emb_mask"]]
    torch.testing.assert_close(module(case.points, case.row_splits), expected, **close)
    keep = torch.tensor([5, 0, 7])
    torch.testing.assert_close(module(case.points, case.row_splits, keep), expected[keep], **close)


PUBLISHED_MEAN = "bn_after.encoder.tokenizer.embedding.first_conv.1.running_mean"


@golden_cases(PUBLISHED_MEAN)
def test_running_means_after_one_step_are_the_published_ones(path):
    case = Case(path)
    module = case.embedding("encoder.tokenizer.embedding", in_channels=4).train()
    module(case.points, case.row_splits)
    torch.testing.assert_close(module.norm1.running_mean, case.tensors[PUBLISHED_MEAN], atol=1e-6, rtol=0)


@golden_cases("head.patch_embed")
def test_energy_branch_is_the_published_one(path):
    case = Case(path)
    module = case.embedding("equivariant_patch_encoder", in_channels=3, slot_embedding=True).eval()
    masked = case.tensors["mask.masked"]
    filled = case.tensors["tok.point_mask"][masked]
    points = case.tensors["tok.groups"][masked][filled][:, :3].float()
    tokens = module(points, offsets_from_lengths(filled.sum(1)))
    torch.testing.assert_close(tokens, case.tensors["head.patch_embed"], atol=2e-5, rtol=1e-4)


# Properties ----------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(lambda lengths: sum(lengths) > 1),
    columns=st.sampled_from([3, 4]),
    empty_slots=st.booleans(),
    code=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_values_gradients_and_statistics_equal_the_definition(lengths, columns, empty_slots, code, seed, data):
    module = embedding(columns=columns, empty_slots=empty_slots, code=code, seed=seed)
    twin = copy.deepcopy(module)
    points, row_splits = random_groups(lengths, columns)
    keep = torch.tensor(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True)))
    mine, theirs = points.clone().requires_grad_(), points.clone().requires_grad_()
    fast, plain = module(mine, row_splits, keep), twin.reference(theirs, row_splits)[keep]
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(fast)
    (fast * weight).sum().backward()
    (plain * weight).sum().backward()
    assert_same(module, twin, [mine.grad, theirs.grad])


@pytest.mark.parametrize("training", [True, False])
def test_chunks_do_not_change_the_result(monkeypatch, training):
    points, row_splits = random_groups([5, 1, 3, 2, 5, 4, 1, 1, 5])
    keep, weight = torch.tensor([8, 0, 3, 4, 1]), torch.randn(5, 6, dtype=torch.float64)
    results = []
    for rows in (2048, 8, 1):
        monkeypatch.setattr("geossl.layers.fast_token_embedding.ROWS_PER_CHUNK", rows)
        module, leaf = embedding(code=True).train(training), points.clone().requires_grad_()
        tokens = module(leaf, row_splits, keep)
        results.append([tokens, *torch.autograd.grad((tokens * weight).sum(), [leaf, *module.parameters()])])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_a_group_without_points_gives_zeros_and_changes_nothing(training):
    module = embedding().train(training)
    points, row_splits = random_groups([2, 3, 4])
    with_empty = module(points, torch.tensor([0, 0, 2, 5, 5, 9]))
    torch.testing.assert_close(with_empty[[1, 2, 4]], module(points, row_splits))
    assert not with_empty[[0, 3]].any()


def test_no_groups_and_no_points():
    module = embedding()
    points = torch.zeros(0, 3, dtype=torch.float64)
    assert module(points, torch.tensor([0])).shape == (0, 6)
    assert torch.equal(module(points, torch.tensor([0, 0, 0])), torch.zeros(2, 6, dtype=torch.float64))
    assert module(*random_groups([2, 3]), torch.zeros(0, dtype=torch.int64)).shape == (0, 6)
    assert module.norm1.num_batches_tracked == 1  # a batch without points moves no statistics


def test_autocast_leaves_the_precision_alone():
    module = PackedTokenEmbedding(24, 4, empty_slots=True).train()
    points, row_splits = torch.randn(60, 4), torch.arange(0, 61, 6)
    exact = module(points, row_splits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(points, row_splits), exact)


@pytest.mark.parametrize(
    ("points", "row_splits", "message"),
    [
        (torch.randn(4, 2), torch.tensor([0, 4]), r"points must be floating \[S, 3\]"),
        (torch.randn(4, 3), torch.tensor([0, 4], dtype=torch.int32), r"row_splits must be int64"),
        (torch.randn(6, 3), torch.tensor([0, 6]), "has 6 points, but slots=5"),
        (torch.randn(6, 3), torch.tensor([0, 4]), "row_splits must start at 0"),
    ],
)
def test_bad_input_is_explained(points, row_splits, message):
    with pytest.raises(ValueError, match=message):
        embedding().float()(points, row_splits)


def test_a_mask_instead_of_numbers_is_explained():
    with pytest.raises(ValueError, match="keep must be the numbers of groups"):
        embedding()(*random_groups([2, 3]), torch.tensor([True, False]))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match="slots must be at least 1"):
        PackedTokenEmbedding(6, 3, slots=0, empty_slots=True)
    with pytest.raises(ValueError, match=r"even widths\[1\]"):
        PackedTokenEmbedding(6, 3, widths=(8, 9, 8), empty_slots=True, slot_embedding=True)


def test_a_process_without_points_is_refused(monkeypatch):
    layer = PackedTokenEmbedding(8, 4, widths=(4, 8, 8), empty_slots=False).train()
    nothing = torch.zeros(0, 4), torch.zeros(1, dtype=torch.int64)
    assert layer(*nothing).shape == (0, 8)
    monkeypatch.setattr("geossl.layers.packed_token_embedding.world_size", lambda: 2)
    with pytest.raises(ValueError, match="this process has no points"):
        layer(*nothing)
    assert layer.eval()(*nothing).shape == (0, 8)
