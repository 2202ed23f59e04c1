from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geossl.engine import Hooks, NonFiniteError, Trainer, World, seed_everything, step_generator, train
from geossl.engine import checkpoint as checkpoint_module
from geossl.errors import CheckpointError, ConfigError

TIMES = {"samples_per_s", "data_wait", "eta"}
CPU = World(torch.device("cpu"))


def program(standin: ModuleType, folder: Path, **changes: Any) -> Any:
    """A stand-in program; `train_x` and `optim_x` change its nested parts."""
    made = standin.Program()
    parts = {part: {k.partition("_")[2]: v for k, v in changes.items() if k.startswith(f"{part}_")} for part in ("train", "optim")}
    own = {k: v for k, v in changes.items() if not k.startswith(("train_", "optim_"))}
    return replace(made, train=replace(made.train, run_folder=folder, **parts["train"]), optim=replace(made.optim, **parts["optim"]), **own)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step_*"))
    return load_file(newest / f"{name}.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_learns_and_leaves_a_complete_folder(standin: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = standin.run(program(standin, folder, train_steps=60, train_save_every=20, train_log_every=5, dropout=0.0, probe_every=25))
    assert (result.step, result.total, result.signal) == (60, 60, None)
    assert losses(folder)[-1] < 0.6 * losses(folder)[0]
    assert set(result.scores) == {"score"}
    assert [row["step"] for row in rows(folder) if "loss" in row] == list(range(5, 61, 5))
    assert [row["step"] for row in rows(folder) if "probe/score" in row] == [25, 50, 60]
    assert {"step", "loss", "error_x1000", "grad_norm", "lr"} == set(rows(folder)[0])
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "export", "metrics.jsonl", "tensorboard"]
    assert_same(load_file(folder / "export/model.safetensors"), weights(folder))


@pytest.mark.parametrize("changes", [{}, {"train_ema": 0.9}, {"train_accumulate": 2}, {"train_precision": "fp16"}, {"probe_every": 3}])
def test_resuming_is_bit_equal_to_never_stopping(standin: ModuleType, tmp_path: Path, changes: dict[str, Any]) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    standin.run(program(standin, straight, **changes))

    class Killed(Exception):
        pass

    class Vectors(standin.Vectors):
        def __next__(self) -> Any:
            if self.position // self.accumulate == 7:
                raise Killed  # three steps after the checkpoint of step 4
            return super().__next__()

    whole = standin.Vectors
    standin.Vectors = Vectors
    try:
        with pytest.raises(Killed):
            standin.run(program(standin, stopped, **changes))
    finally:
        standin.Vectors = whole
    assert len(losses(stopped)) == 7
    standin.run(program(standin, stopped, resume="auto", **changes))
    assert rows(stopped) == rows(straight)
    assert_same(weights(stopped), weights(straight))
    if "train_ema" in changes:
        assert_same(weights(stopped, "ema"), weights(straight, "ema"))
        assert_same(load_file(stopped / "export/model.safetensors"), weights(straight, "ema"))
        assert not torch.equal(weights(stopped, "ema")["head.weight"], weights(stopped)["head.weight"])


def test_accumulation_equals_the_big_batch(standin: ModuleType, tmp_path: Path) -> None:
    for parts in (1, 2, 4):
        standin.run(program(standin, tmp_path / str(parts), train_accumulate=parts, dropout=0.0))
    for parts in ("2", "4"):
        assert losses(tmp_path / parts) == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
        for name, value in weights(tmp_path / parts).items():
            if name != "seen":
                torch.testing.assert_close(value, weights(tmp_path / "1")[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_of_different_size_count_by_their_size(standin: ModuleType, tmp_path: Path) -> None:
    """A batch of 8 in parts of 2 and 6: the gradient is that of the whole."""
    config = program(standin, tmp_path, dropout=0.0)

    def gradient_norm(cuts: list[int]) -> float:
        seed_everything(0)
        module = standin.Autoencoder(dropout=0.0)
        trainer = Trainer(module, standin.Vectors(8), config.train, config.optim, CPU, Hooks())
        whole = next(standin.Vectors(8))
        parts = [standin.Batch(p, s, 8) for p, s in zip(whole.points.split(cuts), whole.slot.split(cuts), strict=True)]
        sums, taken = trainer.train_step(parts, record=True)
        assert taken
        return float(sums["grad_norm"])

    assert gradient_norm([2, 6]) == pytest.approx(gradient_norm([8]), rel=1e-5)


def test_probing_does_not_change_the_training(standin: ModuleType, tmp_path: Path) -> None:
    standin.run(program(standin, tmp_path / "a", train_ema=0.5))
    standin.run(program(standin, tmp_path / "b", train_ema=0.5, probe_every=2))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_seed_decides(standin: ModuleType, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        standin.run(program(standin, tmp_path / name, train_seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_checkpoints_kept(standin: ModuleType, tmp_path: Path) -> None:
    scores = {3: 0.1, 6: 0.9, 9: 0.5, 12: 0.3}

    class Probe:
        step = 0

        def __call__(self, module: Any) -> dict[str, float]:
            self.step += 3
            assert not module.training
            return {"score": scores[self.step]}

    config = program(standin, tmp_path, train_save_every=2, train_keep=2)
    module = standin.Autoencoder()
    train(module, standin.Vectors(8), config.train, config.optim, CPU, hooks=Hooks(probe=Probe(), probe_every=3, best="score"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.json",
        "step_00000006",
        "step_00000010",
        "step_00000012",
    ]
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"step": 6, "name": "score", "value": 0.9}
    assert module.training


def test_the_best_score_may_be_the_lowest_and_is_always_a_number(standin: ModuleType, tmp_path: Path) -> None:
    scores = iter([math.nan, 0.5, 0.2, 0.9, math.nan, 0.3])
    config = program(standin, tmp_path)
    hooks = Hooks(probe=lambda module: {"error": next(scores)}, probe_every=2, best="-error")
    train(standin.Autoencoder(), standin.Vectors(8), config.train, config.optim, CPU, hooks=hooks)
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"step": 6, "name": "error", "value": 0.2}


def test_nonfinite_step_is_skipped_and_its_batch_kept(standin: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    standin.run(program(standin, tmp_path / "bad", poison=(3, 4, 6), train_max_nonfinite=3))
    assert [row["step"] for row in rows(tmp_path / "bad") if row.get("skipped")] == [4, 5, 7]
    assert [row["step"] for row in rows(tmp_path / "bad") if row["loss"] is None] == [4, 5, 7]
    assert all(value.isfinite().all() for value in weights(tmp_path / "bad").values())
    assert "step 3" in caplog.text
    kept = torch.load(tmp_path / "bad/nonfinite_step_3_rank_0.pt", weights_only=True)
    assert kept["step"] == 3
    assert kept["found"]["loss"] != kept["found"]["loss"]
    (batch,) = kept["batches"]
    assert batch["points"].shape == (8, standin.WIDTH)
    assert batch["points"].isnan().sum() == 1
    assert batch["global_size"] == 8
    # The file is enough to repeat the step.
    torch.set_rng_state(kept["rng"]["torch"])
    points = torch.nan_to_num(batch["points"])
    again = standin.Autoencoder()(standin.Batch(points, batch["slot"], 8), generator=step_generator(kept["seed"], kept["step"]))
    assert again.loss.isfinite()


def test_nonfinite_stops_when_it_goes_on(standin: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, the last being step 7\..*nonfinite_step_\*\.pt"):
        standin.run(program(standin, tmp_path, poison=(2, 5, 6, 7), train_max_nonfinite=3))
    assert weights(tmp_path)["head.weight"].isfinite().all()


def test_scaled_gradients_that_overflow_lower_the_scale(standin: ModuleType, tmp_path: Path) -> None:
    config = program(standin, tmp_path, train_precision="fp16", dropout=0.0)
    module = standin.Autoencoder(dropout=0.0)
    trainer = Trainer(module, standin.Vectors(8), config.train, config.optim, CPU, Hooks())
    before = module.head.weight.detach().clone()
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    _, taken = trainer.train_step([next(trainer.loader)], record=True)
    assert not taken
    assert torch.equal(module.head.weight, before)
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.nonfinite_in_a_row == 0
    assert not list(tmp_path.glob("nonfinite*"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_float32(standin: ModuleType, tmp_path: Path, precision: str) -> None:
    for name in ("fp32", precision):
        standin.run(program(standin, tmp_path / name, train_precision=name, dropout=0.0))
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert losses(tmp_path / precision) != losses(tmp_path / "fp32")
    assert weights(tmp_path / precision)["head.weight"].dtype == torch.float32


def test_epochs_set_the_length(standin: ModuleType, tmp_path: Path) -> None:
    assert standin.run(program(standin, tmp_path, train_epochs=2, train_batch_size=10)).total == 8


def test_switches(standin: ModuleType, tmp_path: Path) -> None:
    config = program(standin, tmp_path, train_grad_checkpointing=True, train_profile=True, train_deterministic=True)
    module = standin.Autoencoder()
    try:
        train(module, standin.Vectors(8), config.train, config.optim, CPU)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.checkpointing
    assert "aten::" in (tmp_path / "profile/summary.txt").read_text()
    assert json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    with pytest.raises(ConfigError, match=r"train\.grad_checkpointing: Linear"):
        train(torch.nn.Linear(1, 1), standin.Vectors(8), replace(config.train, run_folder=tmp_path / "b"), config.optim, CPU)


@pytest.mark.slow
def test_compiled_module_gives_the_same_losses(standin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))  # no C++ compiler runs
    for name, compiled in (("a", False), ("b", True)):
        standin.run(program(standin, tmp_path / name, train_compile=compiled, dropout=0.0))
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-4)
    assert weights(tmp_path / "b").keys() == weights(tmp_path / "a").keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_with_a_checkpoint(standin: ModuleType, tmp_path: Path, number: int) -> None:
    class Vectors(standin.Vectors):
        def __next__(self) -> Any:
            if self.position == 6:
                os.kill(os.getpid(), number)
            return super().__next__()

    config = program(standin, tmp_path)
    before = signal.getsignal(number)
    loader = Vectors(8)
    result = train(standin.Autoencoder(), loader, config.train, config.optim, CPU, hooks=Hooks(export=standin.export))
    assert (result.step, result.signal) == (7, number)
    assert max(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == "step_00000007"
    assert not (tmp_path / "export").exists()
    assert loader.closed
    assert signal.getsignal(number) is before


def test_workers_that_die_of_the_signal_do_not_spoil_the_checkpoint(standin: ModuleType, tmp_path: Path) -> None:
    class Vectors(standin.Vectors):
        def __next__(self) -> Any:
            if self.position == 6:
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
            return super().__next__()

    config = program(standin, tmp_path)
    assert train(standin.Autoencoder(), Vectors(8), config.train, config.optim, CPU).step == 6
    assert load_file(tmp_path / "checkpoints/step_00000006/model.safetensors")


def test_full_disk_ends_in_one_error_with_earlier_checkpoints_intact(
    standin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint_module._write_synced

    def full(path: Path, writer: Any) -> None:
        if path.parent.name.startswith(".writing_00000008"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, writer)

    monkeypatch.setattr(checkpoint_module, "_write_synced", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*step_00000004.*--resume auto"):
        standin.run(program(standin, tmp_path))
    monkeypatch.undo()
    assert standin.run(program(standin, tmp_path, resume="auto")).step == 12


def test_checkpoint_of_another_model(standin: ModuleType, tmp_path: Path) -> None:
    standin.run(program(standin, tmp_path))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"belongs to another model: \d+ mismatched \(blocks\.0\.weight \[8, 6\] instead of \[9, 6\]"):
        standin.run(program(standin, tmp_path, hidden=9, resume="auto"))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_state_that_is_not_of_a_training(standin: ModuleType, tmp_path: Path) -> None:
    module = standin.Autoencoder()
    checkpoint_module.write_checkpoint(tmp_path / "checkpoints", 3, {"model": module.state_dict()}, {"optimizer": {}, "trainer": {"a": 1}})
    with pytest.raises(CheckpointError, match="does not hold the state of this training"):
        standin.run(program(standin, tmp_path, resume="auto"))


def test_a_run_is_never_overwritten_by_accident(standin: ModuleType, tmp_path: Path) -> None:
    standin.run(program(standin, tmp_path, train_steps=4))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"train\.run_folder: .* holds a run already, its newest checkpoint is of step 4\..*--resume auto"
    ):
        standin.run(program(standin, tmp_path))
    assert standin.run(program(standin, tmp_path, train_overwrite=True, train_steps=2)).step == 2
    assert len(losses(tmp_path)) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        standin.run(program(standin, tmp_path / "file"))


def test_resume_auto_starts_anew_where_there_is_no_checkpoint_yet(standin: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "checkpoints/.writing_00000001_x").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    assert standin.run(program(standin, tmp_path, resume="auto")).step == 12
    assert len(losses(tmp_path)) == 12
    assert not list((tmp_path / "checkpoints").glob(".writing*"))


def test_resume_auto_does_not_replace_a_finished_run_without_checkpoints(standin: ModuleType, tmp_path: Path) -> None:
    standin.run(program(standin, tmp_path))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="holds a run already, without checkpoints"):
        standin.run(program(standin, tmp_path, resume="auto"))
    assert (tmp_path / "export/model.safetensors").exists()


def test_branching_off_and_continuing_a_finished_run(standin: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    standin.run(program(standin, a, train_keep=9))
    earlier = str(a / "checkpoints/step_00000004")
    with pytest.raises(ConfigError, match=r"later checkpoints, up to step 12; to branch off at step 4"):
        standin.run(program(standin, a, resume=earlier))
    standin.run(program(standin, b, resume=earlier))
    assert rows(b) == rows(a)[4:]
    with caplog.at_level(logging.INFO, "geossl"):
        assert standin.run(program(standin, a, resume="auto")).step == 12
    assert "complete already" in caplog.text
    longer = standin.run(program(standin, a, resume="auto", train_steps=15, optim_lr=0.5, optim_weight_decay=0.0))
    assert longer.step == 15
    assert rows(a)[12]["lr"] > 0.05  # the present configuration decides


def test_ema_can_be_switched_on_later(standin: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    standin.run(program(standin, tmp_path, train_steps=4))
    standin.run(program(standin, tmp_path, train_steps=8, train_ema=0.9, resume="auto"))
    assert "has no moving average" in caplog.text
    assert weights(tmp_path, "ema")


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"batch_size": 0}, {"accumulate": 0}, {"epochs": 0}, {"workers": -1}, {"seed": -1}, {"ema": 1.0}, {"keep": 0}],
)
def test_ranges(standin: ModuleType, values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(values))} must"):
        replace(standin.Program().train, **values)
