"""``geossl fit-gaussians``: a scene of Gaussian splats from posed images.

    fit_gaussians.py                                             a simulated room of 30 views
    fit_gaussians.py FOLDER                                      a folder with transforms.json, or with RGB-D frames (7-Scenes, ScanNet)
    fit_gaussians.py [FOLDER] [CONFIG.yaml] [--fit.steps 5000] [--data.width 320 --data.height 240] [--resume auto]

The run folder then holds ``gaussians.ply``, which splat viewers open, ``views.png`` with held-out views before, after and as they are,
``summary.json``, ``metrics.jsonl``, the resolved configuration and checkpoints.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from geossl.cli.training import exit_code, log, set_up_messages, tell_changes
from geossl.config import load_config, require, to_yaml
from geossl.data import SCENES, RGBDFolderConfig, RoomsConfig, write_gaussians
from geossl.data.files import atomic_write, write_json
from geossl.engine import Result
from geossl.engine.checkpoint import find_checkpoint, prune_checkpoints, read_tensors, step_of, write_checkpoint
from geossl.engine.interrupt import StopRequest
from geossl.engine.log import RunLog, duration
from geossl.engine.run_folder import check_run_folder, prepare_run_folder
from geossl.errors import ConfigError
from geossl.tasks.gaussian_fitting import GaussianFit, GaussianFitConfig, Score

_MOST_FRAMES = 100  # of a folder of RGB-D frames, when nothing is said of how many
_PICTURED = 6


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a fit is written, and how often."""

    run_folder: Path = Path("runs/fit")
    """Everything goes here."""
    overwrite: bool = False
    """Replace a run that is already in run_folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is a device."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    score_every: int = 500
    """Steps between two times that the held-out views are measured; the end always is."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        for key in ("log_every", "score_every", "save_every", "keep"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class FitGaussiansConfig:
    """Fit a scene of Gaussian splats to posed images. The defaults are a simulated room."""

    data: Any = field(default_factory=lambda: RoomsConfig(views=30, width=96, height=72, points=0), metadata={"registry": SCENES})
    """Posed images."""
    row: int = 0
    """Which scene of the data set."""
    fit: GaussianFitConfig = field(default_factory=GaussianFitConfig)
    """How to fit."""
    train: RunConfig = field(default_factory=RunConfig)
    """Where the fit is written, and how often."""
    resume: str = "none"
    """`auto` continues the run in train.run_folder from its newest intact checkpoint, if it has any; or the path of a checkpoint or run
    folder; `none` starts anew."""

    def __post_init__(self) -> None:
        require(self.row >= 0, "row", "must not be negative", self.row)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    named = [args.pop(0) for _ in range(2) if args and not args[0].startswith("-")]
    path = next((name for name in named if Path(name).suffix in (".yaml", ".yml")), None)
    folders = [name for name in named if name != path]
    if len(folders) > 1:
        raise ConfigError(f"fit-gaussians takes one folder and one configuration (.yaml), got {' and '.join(named)}")
    set_up_messages()
    flags = [flag for name in folders for flag in folder_flags(Path(name), args)]
    config = load_config(FitGaussiansConfig, path, [*flags, *args], prog="fit-gaussians [FOLDER] [CONFIG.yaml]")
    return fit(config)


def folder_flags(folder: Path, given: list[str]) -> list[str]:
    """Return the flags that take all posed images of a folder, without those ``given``.

    Raises:
        DataError: the folder is missing, or no layout that is known.
    """
    if (folder / "transforms.json").exists() or folder.suffix == ".json":
        flags = {"data.name": "transforms", "data.root": str(folder), "data.all_views": ""}
    else:
        frames = len(RGBDFolderConfig(root=folder, views=1, step=1).build().frames)
        step = -(-frames // _MOST_FRAMES)
        flags = {"data.name": "rgbd_folder", "data.root": str(folder), "data.step": str(step), "data.views": str((frames - 1) // step + 1)}
    known = {flag.partition("=")[0].removeprefix("--") for flag in given}
    if "data.views" in known:
        flags.pop("data.all_views", None)
    return [text for key, value in flags.items() if key not in known for text in (f"--{key}", value) if text]


def fit(config: FitGaussiansConfig) -> int:
    """Fit as ``config`` says and leave a complete run folder; returns the exit code."""
    run, folder = config.train, config.train.run_folder
    found = find_checkpoint(config.resume, folder)
    continued = found is not None and found.resolve().parent == (folder / "checkpoints").resolve()
    check_run_folder(
        folder,
        overwrite=run.overwrite,
        automatic=config.resume == "auto",
        start=step_of(found) if found is not None and continued else None,
    )
    check_writable(folder)
    device = choose_device(run.device)
    dataset = config.data.build(config.data.split) if hasattr(config.data, "split") else config.data.build()
    if config.row >= len(dataset):
        raise ConfigError(f"row: {config.row} is outside 0..{len(dataset) - 1}, the scenes of the data set")
    work = GaussianFit(dataset[config.row], config.fit, device)
    shown = pictured(work)
    first, before = work.render(shown), work.score()
    if found is not None:
        work.load_state_dict(read_tensors(found / "gaussians.safetensors"))
        tell_changes(started_as(config), folder)
    try:
        prepare_run_folder(folder, to_yaml(started_as(config)), fresh=not continued)
    except OSError as error:
        raise ConfigError(f"train.run_folder: {folder} cannot be written ({error})") from error
    log.info(
        "%s: %d views of %d x %d, %d held out; %d Gaussians to begin with", work.views.source, len(work.views),
        work.views.cameras.width, work.views.cameras.height, len(work.held_out), len(work.rows),
    )  # fmt: skip
    began = time.perf_counter()
    result = run_steps(work, config)
    if result.signal is None:
        finish(work, config, first, shown, before, time.perf_counter() - began)
    return exit_code(result, folder)


def run_steps(work: GaussianFit, config: FitGaussiansConfig) -> Result:
    """Step until the end or until a signal asks to stop; then write a checkpoint."""
    run, total = config.train, config.fit.steps
    saved, request = work.step, StopRequest()
    reporter = RunLog(run.run_folder, work.step, total)
    loss_sum, steps, began = 0.0, 0, time.perf_counter()
    score: Score | None = None
    with request:
        while work.step < total and request.signal is None:
            loss_sum, steps = loss_sum + work.train_step(), steps + 1
            last = work.step == total or request.signal is not None
            values: dict[str, Any] = {}
            if len(work.held_out) and (work.step % run.score_every == 0 or work.step == total):
                paused = time.perf_counter()
                score = work.score()
                began += time.perf_counter() - paused
                values = {"test/psnr": score.psnr, "test/ssim": score.ssim}
            if work.step % run.log_every == 0 or last:
                rate = steps / max(time.perf_counter() - began, 1e-9)
                values |= {"loss": loss_sum / steps, "gaussians": len(work.rows), "steps_per_s": round(rate, 3)}
                values["eta"] = round((total - work.step) / rate, 1)
                reporter.progress(work.step, values, progress_text(values, score))
                loss_sum, steps, began = 0.0, 0, time.perf_counter()
            if values:
                reporter.row(work.step, values)
            if (last or work.step % run.save_every == 0) and work.step != saved:
                paused = time.perf_counter()
                reporter.flush()
                write_checkpoint(run.run_folder / "checkpoints", work.step, {"gaussians": work.state_dict()}, {})
                prune_checkpoints(run.run_folder / "checkpoints", run.keep, None)
                saved, began = work.step, began + time.perf_counter() - paused
    reporter.close()
    return Result(work.step, total, request.signal if work.step < total else None)


def progress_text(values: dict[str, Any], score: Score | None) -> str:
    """Say in one line how far a fit is."""
    measured = "" if score is None else f"PSNR {score.psnr:.2f} dB  SSIM {score.ssim:.3f}  "
    return (
        f"loss {values['loss']:.4f}  {measured}{values['gaussians']} Gaussians  {values['steps_per_s']:.3g} steps/s  "
        f"ETA {duration(values['eta'])}"
    )


def finish(work: GaussianFit, config: FitGaussiansConfig, first: Tensor, shown: list[int], before: Score, seconds: float) -> None:
    """Write the result, and say what came of it."""
    folder, after = config.train.run_folder, work.score()
    write_gaussians(folder / "gaussians.ply", work.gaussians)
    sheet = picture(first, work.render(shown), work.views.image[shown])
    atomic_write(folder / "views.png", lambda file: sheet.save(file, "PNG"))
    summary: dict[str, Any] = {
        "gaussians": len(work.rows),
        "steps": work.step,
        "views": len(work.views),
        "held_out": work.held_out.tolist(),
    }
    summary["background"] = work.background.tolist()
    text = "no view was held out: no PSNR"
    if len(work.held_out):
        summary |= {"psnr": after.psnr, "ssim": after.ssim, "psnr_start": before.psnr, "ssim_start": before.ssim}
        summary["psnr_views"] = [round(value, 3) for value in after.psnrs.tolist()]
        text = (
            f"held-out views ({len(work.held_out)} of {len(work.views)}): PSNR {after.psnr:.2f} dB (at the start {before.psnr:.2f}), "
            f"SSIM {after.ssim:.3f} ({before.ssim:.3f})"
        )
    write_json(folder / "summary.json", summary)
    print(f"{text}; {len(work.rows)} Gaussians, {seconds:.0f} s")
    print(f"look at: {folder / 'views.png'}   open in a splat viewer: {folder / 'gaussians.ply'}")


def pictured(work: GaussianFit) -> list[int]:
    """Return the rows of the views that are pictured: some held out, spread over all; or the first, when none are."""
    rows = work.held_out if len(work.held_out) else torch.arange(len(work.views))
    return rows[torch.linspace(0, len(rows) - 1, min(_PICTURED, len(rows))).round().long()].tolist()


def picture(before: Tensor, after: Tensor, true: Tensor) -> Any:
    """Draw views ``[n, H, W, 3]`` in columns: before, after, as they are."""
    from PIL import Image, ImageDraw

    count, height, width = true.shape[:3]
    enlarge = max(1, -(-240 // width))
    across, down, gap, head = width * enlarge, height * enlarge, 4, 18
    sheet = Image.new("RGB", (3 * (across + gap) + gap, head + count * (down + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate((("before", before), ("after", after), ("held-out view", true))):
        left = gap + column * (across + gap)
        draw.text((left + 2, 3), title, fill="black")
        pixels = (images.cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        for number in range(count):
            tile = Image.fromarray(pixels[number]).resize((across, down), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, head + number * (down + gap)))
    return sheet


def started_as(config: FitGaussiansConfig) -> FitGaussiansConfig:
    """The configuration as it is written into the run folder: fed back, it starts the same run, and overwrites nothing."""
    return dataclasses.replace(config, resume="none", train=dataclasses.replace(config.train, overwrite=False))


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before any work is done for it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"train.run_folder: {folder} cannot be written: {there} is {'not writable' if there.is_dir() else 'a file'}")


def choose_device(name: str) -> torch.device:
    """Return the device of that name, which is there.

    Raises:
        ConfigError: it is not.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device: 'cuda' was asked for, but torch sees no CUDA device; take 'cpu' or 'auto'")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
