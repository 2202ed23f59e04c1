"""``geossl evaluate matches``: score the matches that a pretrained pair of encoder and decoder finds without training for them.

    evaluate.py matches MODEL [--data.name stereo --data.layout list --data.root pairs.txt] [--split all] [--size 384 512]

MODEL is a run folder of ``geossl pretrain`` with method croco, an export or converted folder, or an official CroCo file. The data are pairs
with flow or disparity. Beside every score stands what a method would get that takes every patch to be where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geossl.cli.training import make_console
from geossl.config import load_config, require, split_arguments
from geossl.data import DATASETS, ImageSample
from geossl.data.files import write_json
from geossl.errors import ConfigError, DataError
from geossl.evaluation import Matches, MatchScores, match_patches, score_matches, stay_put
from geossl.models import CroCoPair, load_pair_backbone


def rooms_with_flow() -> Any:
    """Rendered pairs of simulated rooms, whose flow is exact."""
    return replace(DATASETS.config("room_pairs"), truth="flow")


@dataclass(kw_only=True)
class EvaluateMatchesConfig:
    """Score matches read off the cross-attention of a pretrained pair of encoder and decoder."""

    data: Any = field(default_factory=rooms_with_flow, metadata={"registry": DATASETS})
    """Pairs with flow or disparity."""
    split: Literal["train", "test", "all"] = "test"
    """Which part; `all` where the data set has it."""
    size: tuple[int, int] | None = None
    """Height and width to which images are brought; null leaves them as they are. What exceeds whole patches is cut off at the right and
    the bottom."""
    out: Path | None = None
    """File for the scores; default ``evaluation_matches_<data>.json`` in the model's folder, or here."""
    device: str = "auto"
    """Where to compute; `auto` takes CUDA where there is a device."""

    def __post_init__(self) -> None:
        require(self.size is None or min(self.size) >= 16, "size", "must be at least 16 x 16", self.size)


def main(argv: list[str]) -> int:
    """Run the program; returns its exit code."""
    name, args = split_arguments(argv)
    if name is None:
        load_config(EvaluateMatchesConfig, None, args, prog="evaluate matches MODEL")  # prints --help, or names a wrong flag
        raise ConfigError("evaluate matches: name a model first: a run folder of method croco, or an official file; see --help")
    path, args = split_arguments(args)
    config = load_config(EvaluateMatchesConfig, path, args, prog="evaluate matches MODEL")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    pair = load_pair_backbone(name).to(device)
    scores = score_pairs(pair, config.data.build(config.split), config.size)
    show(config, scores)
    out = config.out or (Path(name) if Path(name).is_dir() else Path()) / f"evaluation_matches_{config.data.name}.json"
    write_json(out, {"model": name, "data": config.data.name, "split": config.split, "scores": {k: v._asdict() for k, v in scores.items()}})
    print(f"written to {out}")
    return 0


@torch.inference_mode()
def score_pairs(pair: CroCoPair, dataset: Any, size: tuple[int, int] | None) -> dict[str, MatchScores]:
    """Score the matches of ``pair``, and those of a method that says every patch stayed where it was, on all samples of ``dataset``.

    Raises:
        DataError: there are no samples, or they have no flow and no disparity.
    """
    patch, device = pair.backbone.config.patch, next(pair.parameters()).device
    found: dict[str, list[Matches]] = {"cross-attention": [], "every patch where it was": []}
    flows: list[Tensor] = []
    for row in range(len(dataset)):
        sample = dataset.get(row)
        if not isinstance(sample, ImageSample) or sample.reference is None or sample.truth is None or len(sample.truth) > 2:
            raise DataError(
                f"{dataset.config.name}: matches are scored on pairs with flow or disparity; choose other data, or --data.truth flow"
            )
        image, reference, flow = fitted(sample.image, sample.reference, as_flow(sample.truth), size, patch)
        grid = image.shape[1] // patch, image.shape[2] // patch
        attention = pair.cross_attention(image[None].to(device), reference[None].to(device))[0].cpu()
        found["cross-attention"].append(match_patches(attention, grid, patch))
        found["every patch where it was"].append(stay_put(grid, patch))
        flows.append(flow)
    if not flows:
        raise DataError(f"{dataset.config.name}: there is nothing to score in this part; choose another with --split")
    return {name: score_matches(matches, flows, patch) for name, matches in found.items()}


def as_flow(truth: Tensor) -> Tensor:
    """Return flow ``[2, H, W]`` as it is, and disparity ``[1, H, W]`` as the flow from the left image to the right one."""
    return truth if len(truth) == 2 else torch.cat([-truth, torch.where(truth.isfinite(), 0.0, torch.inf)])


def fitted(image: Tensor, reference: Tensor, flow: Tensor, size: tuple[int, int] | None, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring a pair and its flow to ``size`` and cut off what exceeds whole patches; flow is that of the nearest pixel."""
    if flow.shape[1] == 2 * image.shape[1]:  # Spring's has four values a pixel
        flow = flow[:, ::2, ::2]
    if size is not None:
        height, width = image.shape[1:]
        image, reference = (F.interpolate(x[None], size, mode="bilinear", antialias=True)[0] for x in (image, reference))
        scale = flow.new_tensor([size[1] / width, size[0] / height])[:, None, None]
        flow = F.interpolate(flow[None], size, mode="nearest-exact")[0] * scale
    rows, columns = (side // patch * patch for side in image.shape[1:])
    if min(rows, columns) == 0:
        raise DataError(f"size: images of {image.shape[1]} x {image.shape[2]} pixels hold no patch of {patch} x {patch}")
    cut = [x[:, :rows, :columns] for x in (image, reference, flow)]
    return cut[0], cut[1], cut[2]


def show(config: EvaluateMatchesConfig, scores: dict[str, MatchScores]) -> None:
    """Print the table of the scores."""
    from rich.table import Table

    console, table = make_console(), Table()
    first = next(iter(scores.values()))
    console.print(f"matches on the part {config.split} of {config.data.name}, {first.patches} patches")
    table.add_column("")
    for title in ("median error, pixels", *(f"within {limit:g} patches" for limit in first.within)):
        table.add_column(title, justify="right")
    for name, score in scores.items():
        table.add_row(name, f"{score.median_error:.1f}", *(f"{100 * share:.1f} %" for share in score.within.values()))
    console.print(table)
