from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from geossl.engine.log import RunLog, Stopwatch, drop_rows_after

ROW = {"loss": 0.5, "samples_per_s": 100.0, "data_wait": 0.25, "lr": 1e-3, "eta": 4000.0}


def test_rows_and_plain_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 0, 100)
    log.row(10, ROW)
    log.row(20, {"loss": float("nan"), "skipped": True})
    log.progress(10, ROW)
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 10, **ROW}, {"step": 20, "loss": None, "skipped": True}]
    assert capsys.readouterr().out == "step 10/100  loss 0.5  100 samples/s  data 25 %  lr 0.001  ETA 67 min\n"


def test_tensorboard_events_hold_the_rows(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0, 100)
    log.row(10, {"loss": 0.5, "skipped": True})
    log.row(10, {"probe/svm": 0.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "probe/svm"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.5)]


def test_rows_of_a_killed_process_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    RunLog(tmp_path, 2, 10).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_rows_after(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_stopwatch_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    for _ in range(4):
        watch.step(8)
        watch.waited(0.5)
    now[0] = 10.0
    watch.paused(6.0)
    assert watch.read() == {"samples_per_s": 8.0, "data_wait": 0.5}
    assert watch.seconds_per_step == 1.0
    now[0] = 12.0
    watch.step(8)
    assert watch.read() == {"samples_per_s": 4.0, "data_wait": 0.0}


def progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", kind)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    log = RunLog(tmp_path, 0, 100)
    for step in (10, 20):
        log.progress(step, ROW)
    log.close()
    return terminal.getvalue()


def test_one_live_line_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = progress_on_a_terminal(tmp_path, monkeypatch, "xterm")
    assert "20/100" in shown
    assert "loss 0.5  100 samples/s  data 25 %  lr 0.001  ETA 67 min" in shown
    assert "\r" in shown  # drawn over itself


def test_plain_lines_on_a_terminal_that_moves_no_cursor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = progress_on_a_terminal(tmp_path, monkeypatch, "dumb")
    assert [line.split("  ")[0] for line in shown.splitlines()] == ["step 10/100", "step 20/100"]
