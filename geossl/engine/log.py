"""What a run tells while it trains: the progress line, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from geossl.engine.checkpoint import write_text_atomically

log = logging.getLogger("geossl")


class RunLog:
    """Writes the rows of one run. Only the main process makes one.

    Args:
        run_folder: ``metrics.jsonl`` and ``tensorboard/`` are written there.
        start: Steps done so far; rows of later steps, written by a process that was killed, are removed.
        total: Steps of the whole training, for the ETA.
    """

    def __init__(self, run_folder: Path, start: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_folder / "metrics.jsonl"
        drop_rows_after(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=start + 1)
        self._progress = _Progress(start, total)

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Append a row. Numbers that are not finite become null, which every JSON reader takes."""
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for key, value in clean.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(key if "/" in key else f"train/{key}", value, step)

    def progress(self, step: int, values: dict[str, Any], text: str | None = None) -> None:
        """Show where the training is; ``text`` says it in other words than those of a training."""
        self._progress.show(step, _training_text(values) if text is None else text)

    def flush(self) -> None:
        """Bring everything onto the disk."""
        os.fsync(self._file.fileno())
        self._writer.flush()

    def close(self) -> None:
        """Finish the files and the progress line."""
        self._progress.close()
        self._file.close()
        self._writer.close()


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps after ``step``, and a last line cut off in the middle, from a ``metrics.jsonl``."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off when the process was killed
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text_atomically(path, "".join(kept))


class Stopwatch:
    """Times the steps between two log rows, leaving out what is not training (probes, checkpoints)."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._restart()

    def _restart(self) -> None:
        self._begin, self._waited, self._paused, self._samples, self._steps = time.perf_counter(), 0.0, 0.0, 0, 0

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Count time spent on something else than training."""
        self._paused += seconds

    def step(self, samples: int) -> None:
        """Count one step of ``samples`` samples."""
        self._samples += samples
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return ``samples_per_s`` and ``data_wait`` (share of the time, 0 to 1) since the last reading, and start anew."""
        seconds = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        result = {"samples_per_s": round(self._samples / seconds, 3), "data_wait": round(self._waited / seconds, 4)}
        self.seconds_per_step = seconds / max(self._steps, 1)
        self._restart()
        return result


class _Progress:
    """One live line with rich on a terminal that can redraw it; plain lines, one per log row, anywhere else."""

    def __init__(self, start: int, total: int) -> None:
        self._total = total
        self._bar: Any = None
        if not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console()
        if not console.is_dumb_terminal:  # TERM=dumb moves no cursor
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(10), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=console, refresh_per_second=2)
            self._task = self._bar.add_task("train", total=total, completed=start, text="")
            self._bar.start()

    def show(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text, refresh=True)
        else:
            print(f"step {step}/{self._total}  {text}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _training_text(values: dict[str, Any]) -> str:
    return (
        f"loss {values['loss']:.5g}  {values['samples_per_s']:.4g} samples/s  "
        f"data {100 * values['data_wait']:.0f} %  lr {values['lr']:.3g}  ETA {duration(values['eta'])}"
    )


def duration(seconds: float) -> str:
    """Say a time span in the unit that suits it: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
