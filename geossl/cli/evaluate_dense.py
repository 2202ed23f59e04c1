"""``geossl evaluate dense``: predict disparity, flow, depth or normals of images, and score a model, of relative pose too, on test data.

    evaluate.py dense MODEL --left left.jpg --right right.jpg --out disparity.png [--truth disparity_true.png]
    evaluate.py dense MODEL [CONFIG.yaml] [--data.name room_pairs ...]

MODEL is a run folder of ``geossl finetune`` with task stereo, flow, depth, normals or relative_pose, or an official stereo or flow file of
CroCo.
Images of any size are predicted in windows, see ``geossl.tasks.tiling``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geossl.cli.evaluate import data_of_run
from geossl.cli.finetune import check_images
from geossl.cli.scores import score_task
from geossl.cli.training import make_console
from geossl.config import load_config, registry_field, require, split_arguments
from geossl.data import DATASETS
from geossl.data.dense_files import SPRING, read_disparity, read_flow, read_npy, read_pfm, write_flo, write_pfm
from geossl.data.files import atomic_write, write_json
from geossl.data.image_files import decode_image
from geossl.data.scene import read_depth
from geossl.errors import CheckpointError, ConfigError, DataError
from geossl.evaluation import DenseMeter
from geossl.evaluation.dense_pictures import paint
from geossl.geometry import normalize_images
from geossl.layers.dense_errors import CHANNELS
from geossl.methods.reference import find_system, load_reference
from geossl.tasks import Dense, RelativePose, load_task
from geossl.tasks.dense import PairDenseConfig


@dataclass(kw_only=True)
class EvaluateDenseConfig:
    """Predict disparity, flow, depth or normals of images, or score a model on a test part."""

    left: Path | None = None
    """Image to predict: of a stereo pair the left one, of flow the first; null scores on ``data``."""
    right: Path | None = None
    """The second image, for stereo and flow."""
    truth: Path | None = None
    """What is true, to be scored against: a .npy, .pfm or .flo file, or a 16-bit png (disparity times 256 and flow as of KITTI, depth in
    millimetres)."""
    out: Path | None = None
    """File to write. Of an image: .npy or .pfm (numbers), .flo (flow), .png (a picture in colours). Of a data set: the scores as JSON, by
    default ``evaluation_<task>_<data>.json`` in the model's folder, or here."""
    data: Any = registry_field(DATASETS, default="room_pairs")  # noqa: RUF009 - makes a dataclass field
    """Data set with truth; default: what the run was trained on."""
    window: tuple[int, int] | None = None
    """Height and width of the windows; null: those of the training."""
    overlap: float | None = None
    """Share of a window that its neighbours cover as well; null: as trained with (published: 0.7, for benchmarks 0.9)."""
    windows_at_once: int = 1
    """Windows predicted together."""
    published: bool = False
    """Enlarge images smaller than the window exactly as the published code does, with its mistake."""
    device: str = "auto"
    """Where to compute; `auto` takes CUDA where there is a device."""

    def __post_init__(self) -> None:
        require(self.windows_at_once >= 1, "windows_at_once", "must be at least 1", self.windows_at_once)
        require(self.overlap is None or 0 <= self.overlap < 1, "overlap", "must lie in [0, 1)", self.overlap)
        alone = self.right is None and self.truth is None
        require(self.left is not None or alone, "left", "must be given with right or truth", self.left)


def main(argv: list[str]) -> int:
    """Run the program; returns its exit code."""
    name, args = split_arguments(argv)
    if name is None:
        load_config(EvaluateDenseConfig, None, args, prog="evaluate dense MODEL")  # prints --help, or names a wrong flag
        raise ConfigError("evaluate dense: name a model first: a run folder, or an official file; see --help")
    path, args = split_arguments(args)
    told = path is not None or any(flag.partition("=")[0] in ("--data.name", "--left") for flag in args)
    found = [] if told else data_of_run(Path(name), whole=True)
    config = load_config(EvaluateDenseConfig, path, [*found, *args], prog="evaluate dense MODEL")
    if not told and not found:
        raise ConfigError(
            f"data: {name} does not tell what it was trained on, or a mixture; give --left, --data.name with its settings, or a file"
        )
    module = load_dense(name, config)
    return predict_images(module, config) if isinstance(module, Dense) and config.left is not None else score(name, module, config)


def load_dense(name: str, config: EvaluateDenseConfig) -> Dense | RelativePose:
    """Load a model, dense or of relative pose, from a run folder or an official file, on its device, with the windows of ``config``."""
    official = Path(name).is_file()
    module = load_reference(find_system(name), name) if official else load_task(name)
    if isinstance(module, Dense):
        changes: dict[str, Any] = {"windows_at_once": config.windows_at_once}
        if config.window is not None:
            changes["window"] = config.window
        if config.overlap is not None:
            changes["overlap"] = config.overlap
        module.config = replace(module.config, **changes)
    elif not isinstance(module, RelativePose):
        raise CheckpointError(f"{name}: holds a {type(module).__name__}, expected a model of task {', '.join(CHANNELS)} or relative_pose")
    elif config.left is not None:
        raise ConfigError("left: task relative_pose predicts no images; leave it out, and the motions of a test part are scored")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return module.to(device).eval()


def predict_images(module: Dense, config: EvaluateDenseConfig) -> int:
    """Predict ``config.left`` (and ``config.right``), write what is asked for, and say how good it is where the truth is given."""
    kind = module.config.name
    pair = isinstance(module.config, PairDenseConfig)
    if pair != (config.right is not None):
        raise ConfigError(f"right: task {kind} predicts {'pairs; give the second image' if pair else 'single images; leave it out'}")
    if config.out is None and config.truth is None:
        raise ConfigError("out: give a file to write (.npy, .pfm, .flo or .png), or --truth to score against")
    check_out(config.out, kind)
    left, right = (None if path is None else read_normalized(path) for path in (config.left, config.right))
    assert left is not None
    if right is not None and right.shape != left.shape:
        raise DataError(f"{config.right}: is {list(right.shape[2:])}, but {config.left} is {list(left.shape[2:])}; pairs have one size")
    truth = None if config.truth is None else read_truth(config.truth, kind)
    factor = 2 if config.truth is not None and config.truth.suffix in SPRING else 1
    if truth is not None and [*truth.shape[1:]] != [factor * side for side in left.shape[2:]]:
        raise DataError(f"{config.truth}: is {list(truth.shape[1:])}, but {config.left} is {list(left.shape[2:])}")
    device = next(module.parameters()).device
    started = time.perf_counter()
    prediction = module.predict(left.to(device), None if right is None else right.to(device), published=config.published)
    values = prediction.values[0].cpu()
    print(f"{kind} of {left.shape[3]} x {left.shape[2]} pixels in {time.perf_counter() - started:.1f} s")
    if truth is not None:
        meter = DenseMeter(kind)
        meter.update(values[None], truth[None])
        show(f"{kind} against {config.truth}", meter.scores())
    if config.out is not None:
        write_values(config.out, kind, values, truth)
        print(f"written to {config.out}")
    return 0


def score(name: str, module: Dense | RelativePose, config: EvaluateDenseConfig) -> int:
    """Score ``module`` on the test part of ``config.data``."""
    test = config.data.build("test")
    if not len(test):
        raise DataError(f"data: {config.data.name} has no test part to score {name} on; choose other data")
    check_images(test, module.config, training=False)
    scores = score_task(module, test, 1)
    show(f"{module.config.name} on the test part of {config.data.name}, {len(test)} samples", scores)
    out = config.out or (Path(name) if Path(name).is_dir() else Path()) / f"evaluation_{module.config.name}_{config.data.name}.json"
    write_json(out, {"model": name, "task": module.config.name, "data": config.data.name, "samples": len(test), "scores": scores})
    print(f"written to {out}")
    return 0


def read_normalized(path: Path) -> Tensor:
    """Read an image file as the networks take it, ``[1, 3, H, W]``."""
    return normalize_images(decode_image(path, str(path)).float() / 255)[None]


def check_out(path: Path | None, kind: str) -> None:
    """Check that the predictions of task ``kind`` can be written to ``path``."""
    suffixes = [".npy", ".png", *([".flo"] if kind == "flow" else []), *([".pfm"] if CHANNELS[kind] in (1, 3) else [])]
    if path is not None and path.suffix not in suffixes:
        raise ConfigError(f"out: must end in {', '.join(suffixes)} for task {kind}, got {path}")


def show(title: str, scores: dict[str, float]) -> None:
    """Print the table of the scores."""
    from rich.table import Table

    console, table = make_console(), Table()
    console.print(title)
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)


def read_truth(path: Path, kind: str) -> Tensor:
    """Read truth for task ``kind``, ``[C, H, W]`` float32, infinite where unknown; Spring's has four values a pixel."""
    if kind == "stereo":
        return read_disparity(path, all_four=True)
    if kind == "flow":
        return read_flow(path, all_four=True)
    if kind == "depth":  # as disparity, in which what is not positive is unknown, too
        return read_depth(path)[0][None] if path.suffix.lower() == ".png" else read_disparity(path)
    values = read_npy(path) if path.suffix.lower() == ".npy" else read_pfm(path)
    if values.ndim != 3 or values.shape[2] != 3:
        raise DataError(f"{path}: normals must be [H, W, 3], got {list(values.shape)}")
    return torch.from_numpy(values.astype(np.float32).transpose(2, 0, 1).copy())


def write_values(path: Path, kind: str, values: Tensor, truth: Tensor | None) -> None:
    """Write predicted ``values [C, H, W]`` in the format that the name of ``path`` asks for; ``truth`` sets the range of the colours."""
    numbers = values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).numpy()
    if path.suffix == ".npy":
        atomic_write(path, lambda file: np.save(file, numbers))
    elif path.suffix == ".png":
        from PIL import Image

        picture = Image.fromarray((255 * paint(kind, values, truth)).round().astype(np.uint8))
        atomic_write(path, lambda file: picture.save(file, "PNG"))
    elif path.suffix == ".flo":
        write_flo(path, numbers)
    else:
        write_pfm(path, numbers)
