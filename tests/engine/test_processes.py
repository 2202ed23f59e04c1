"""The engine through real processes: torchrun, signals, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__).with_name("standin.py"))
TIMES = {"samples_per_s", "data_wait", "eta"}

pytestmark = pytest.mark.slow


def start(folder: Path, *flags: str, processes: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launcher, SCRIPT, "--train.run_folder", str(folder), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def run(folder: Path, *flags: str, processes: int = 0, code: int = 0) -> str:
    process = start(folder, *flags, processes=processes)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out + err


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").glob("step_*")) / f"{name}.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


EXACT = ("--dropout", "0", "--train.ema", "0.9")  # dropout draws from each process's own random state


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    run(folder, *EXACT, "--train.keep", "9")
    return folder


def test_two_ddp_processes_give_the_losses_of_one(single: Path, tmp_path: Path) -> None:
    out = run(tmp_path / "run", *EXACT, "--train.accumulate", "2", "--probe_every", "5", processes=2)
    assert out.count("step 12/12") == 1  # one process speaks
    pairs = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["loss"] for row in pairs] == pytest.approx(losses(single), rel=1e-5)
    assert [row["error_x1000"] for row in pairs] == pytest.approx([1000 * loss for loss in losses(single)], rel=1e-5)
    ours = weights(tmp_path / "run")
    assert ours.pop("seen") == 2 * 12
    assert_close({**ours, "seen": weights(single)["seen"]}, weights(single))


def test_two_fsdp_processes_give_the_losses_of_one_and_one_continues(single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sharded = (*EXACT, "--train.keep", "9", "--train.parallel", "fsdp")
    run(folder, *sharded, "--probe_every", "5", "--train.accumulate", "2", processes=2)
    assert [row["loss"] for row in rows(folder) if "loss" in row] == pytest.approx(losses(single), rel=1e-5)
    ours, theirs = weights(folder, "ema"), weights(single, "ema")
    assert_close({k: v for k, v in ours.items() if k != "seen"}, {k: v for k, v in theirs.items() if k != "seen"})
    assert_same(load_file(folder / "export/model.safetensors"), weights(folder, "ema"))
    # A sharded run's checkpoint is a whole one: one process goes on with it, and two sharded ones with that of one process.
    branch = "checkpoints/step_00000008"
    run(tmp_path / "one", *EXACT, "--resume", str(folder / branch))
    assert losses(tmp_path / "one") == pytest.approx(losses(single)[8:], rel=1e-5)
    run(tmp_path / "two", *sharded, "--resume", str(single / branch), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(single)[8:], rel=1e-5)


def test_two_processes_resume_bit_equal(tmp_path: Path) -> None:
    """With dropout: each process's own random state comes back."""
    run(tmp_path / "straight", "--train.keep", "9", processes=2)
    run(tmp_path / "again", "--resume", str(tmp_path / "straight/checkpoints/step_00000004"), processes=2)
    assert rows(tmp_path / "again") == rows(tmp_path / "straight")[4:]
    assert_same(weights(tmp_path / "again"), weights(tmp_path / "straight"))


def test_nonfinite_in_one_process_is_agreed_on(tmp_path: Path) -> None:
    run(tmp_path / "run", "--poison", "5", processes=2)  # the NaN is in the part of process 0
    assert [row["step"] for row in rows(tmp_path / "run") if row.get("skipped")] == [6]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    kept = [torch.load(tmp_path / f"run/nonfinite_step_5_rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [bool(file["batches"][0]["points"].isnan().any()) for file in kept] == [True, False]


def test_kill_and_resume_is_bit_equal(tmp_path: Path) -> None:
    run(tmp_path / "straight", "--probe_every", "3")
    flags = ("--probe_every", "3", "--resume", "auto")
    process = start(tmp_path / "killed", *flags, "--step_delay", "0.1")
    wait_for(lambda: (tmp_path / "killed/metrics.jsonl").exists() and len(rows(tmp_path / "killed")) > 8, process)
    process.kill()
    process.communicate()
    assert rows(tmp_path / "killed")[-1]["step"] not in (4, 8, 12)
    run(tmp_path / "killed", *flags)
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "straight"))


def test_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    folder = tmp_path / "killed"
    process = start(folder, "--sync_delay", "0.3")
    wait_for(lambda: list((folder / "checkpoints").glob(".writing_00000008*/optimizer.pt")), process)
    process.kill()
    process.communicate()
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_00000004"]
    run(folder, "--resume", "auto")
    assert not list((folder / "checkpoints").glob(".writing*"))
    assert rows(folder) == rows(tmp_path / "straight")
    assert_same(weights(folder), weights(tmp_path / "straight"))


@pytest.mark.parametrize("processes", [0, 2])
def test_sigterm_ends_with_a_checkpoint(tmp_path: Path, processes: int) -> None:
    run(tmp_path / "straight", processes=processes)
    folder = tmp_path / "stopped"
    process = start(folder, "--step_delay", "0.2", "--train.save_every", "100", processes=processes)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(rows(folder)) > 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    if not processes:
        assert process.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in out + err
    (newest,) = (folder / "checkpoints").glob("step_*")
    assert newest.name == f"step_{rows(folder)[-1]['step']:08d}"
    run(folder, "--resume", "auto", processes=processes)
    assert rows(folder) == rows(tmp_path / "straight")
    assert_same(weights(folder), weights(tmp_path / "straight"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.stepz", "3"], "unknown flag '--train.stepz'; did you mean '--train.steps'"),
        (["--train.parallel", "fsdp"], "train.parallel is fsdp, which needs torchrun"),
        (["--resume", "nowhere"], "nowhere: no checkpoint there"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_written(tmp_path: Path, flags: list[str], words: str) -> None:
    out = run(tmp_path / "run", *flags, code=2)
    assert words in out
    assert len(out.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(tmp_path: Path) -> None:
    assert "train.device is cuda, but torch sees no CUDA device" in run(tmp_path / "run", "--train.device", "cuda", code=2)
