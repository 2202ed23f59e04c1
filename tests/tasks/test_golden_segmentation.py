"""PoLAr-MAE's segmentation against tensors computed with the published implementation.

Every file of ``GEOSSL_GOLDEN/polar_mae`` whose metadata says ``model = SemanticSegmentation`` is run, so further cases of the same form
need no code: point the variable at their folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from geossl import ops
from geossl.geometry import PackedPoints
from geossl.tasks.segmentation import PointHead, convert_reference_head, focal_loss, fuse_layers

ROOT = Path(os.environ.get("GEOSSL_GOLDEN", Path(__file__).parents[1] / "golden")) / "polar_mae"


def segmentation_cases() -> list[Path]:
    cases = []
    for path in sorted(ROOT.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("model") == "SemanticSegmentation":
                cases.append(path)
    return cases


class Case:
    """One golden file: its tensors, packed, and its weights."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        self.config, self.extra = json.loads(metadata["config"]), json.loads(metadata["ctor"])
        self.param_order: list[str] = json.loads(metadata["param_order"])
        self.state = {key.removeprefix("state."): value.float() for key, value in self.tensors.items() if key.startswith("state.")}
        self.state |= {k.removeprefix("state_x16."): v.float() / 16 for k, v in self.tensors.items() if k.startswith("state_x16.")}
        self.events = PackedPoints.from_padded(self.tensors["in.points"], self.tensors["in.lengths"])
        self.point_mask, self.token_mask = self.tensors["seg.point_mask"], self.tensors["tok.emb_mask"]
        self.label = self.tensors["in.semantic_id"][..., 0].long()[self.point_mask]
        self.token_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.token_mask.sum(1).cumsum(0)])
        self.has_decoder = bool(self.extra.get("seg_decoder_depth"))

    def points(self, name: str) -> Tensor:
        return self.tensors[name][self.point_mask]

    def tokens(self, name: str) -> Tensor:
        return self.tensors[name][self.token_mask]


@pytest.fixture(scope="module", params=segmentation_cases(), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(actual: Tensor, expected: Tensor, *, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=rtol, atol=atol)


def test_a_case_is_found() -> None:
    assert segmentation_cases(), f"no segmentation case in {ROOT}; GEOSSL_GOLDEN must name a folder with a polar_mae sub-folder"


@pytest.mark.golden
def test_layers_are_fused_as_published(case: Case) -> None:
    if case.has_decoder:
        pytest.skip("this case has a decoder instead")
    hidden = [layer[case.token_mask] for layer in case.tensors["enc.hidden"]]
    fused = fuse_layers([hidden[i] for i in case.extra["seg_head_fetch_layers"]], batchwide=True)
    close(fused, case.tokens("seg.token_features"))


@pytest.mark.golden
def test_the_head_on_given_token_features(case: Case) -> None:
    weights, feats, centers = convert_reference_head(case.state), case.tokens("seg.token_features"), case.tokens("tok.centers")
    hidden, dim = weights["conv1.weight"].shape[0], feats.shape[1]
    head = PointHead(
        dim,
        case.extra["num_classes"],
        hidden=hidden,
        global_dim=weights["conv1.weight"].shape[1] - dim,
        dropout=0.5,
        neighbors=5,
        absent_neighbors_first=True,
    ).eval()
    head.load_state_dict(weights)
    coord, offsets = case.events.coord, case.events.offsets
    index, _ = head.token_weights(coord, offsets, centers, case.token_offsets)
    local = index - case.token_offsets[:-1].repeat_interleave(offsets.diff())[:, None]
    close(local, case.points("seg.knn_idx").long(), rtol=0, atol=0)
    x = head.upsample(coord, offsets, feats, centers, case.token_offsets)
    close(x[:, :8], case.points("seg.upsampled_first8"))
    close(x.mean(1), case.points("seg.upsampled_mean_over_channels"))
    shared = None
    if "seg.global_max" in case.tensors:
        shared = torch.cat([ops.segment_reduce(feats, case.token_offsets, kind) for kind in ("max", "mean")], 1)
        close(shared, torch.cat([case.tensors["seg.global_max"], case.tensors["seg.global_mean"]], 1))
    log_probs = head(x, offsets, shared).log_softmax(1)
    close(log_probs, case.points("seg.log_probs"), rtol=0, atol=1e-4)
    assert torch.equal(log_probs.argmax(1), case.points("seg.pred").long())
    if "loss.eval.focal" in case.tensors:
        known = case.label >= 0
        loss = focal_loss(log_probs[known], case.label[known], case.state["loss_func.weight"], gamma=2.0)
        close(loss, case.tensors["loss.eval.focal"], rtol=1e-5, atol=0)
