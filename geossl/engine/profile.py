"""A switch that traces a few steps with torch.profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

log = logging.getLogger("geossl")


class Profiler:
    """Traces steps 3 to 5 of a run: ``trace.json`` (open it in ui.perfetto.dev or chrome://tracing) and ``summary.txt``.

    Args:
        folder: Where the two files go.
        enabled: False makes everything here do nothing.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        self._folder = folder
        self._profile: Any = None
        if enabled:
            from torch.profiler import ProfilerActivity, profile, schedule

            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
            steps = schedule(wait=1, warmup=1, active=3, repeat=1)
            self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write)

    def __enter__(self) -> Profiler:
        """Start."""
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop."""
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """Tell that a step is done."""
        if self._profile is not None:
            self._profile.step()

    def _write(self, profile: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self._folder / "summary.txt").write_text(profile.key_averages().table(sort_by=by, row_limit=40) + "\n")
        log.info("profile written to %s", self._folder)
