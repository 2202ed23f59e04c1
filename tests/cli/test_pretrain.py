from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import geossl
from geossl.cli import run
from geossl.cli.finetune import FinetuneConfig
from geossl.cli.pretrain import PretrainConfig
from geossl.cli.training import MicroBatches, split_batch
from geossl.config import field_docs, from_dict, load_config, read_yaml, to_yaml
from geossl.data import DATASETS, build_loader
from geossl.errors import CheckpointError

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/point_mae/smoke.yaml")
TIMES = {"samples_per_s", "data_wait", "eta"}
QUICK = ["--train.steps", "6", "--train.batch_size", "8", "--train.log_every", "1", "--train.save_every", "2", "--probe.every", "0"]
QUICK += ["--probe.no_report", "--data.points", "128", "--train.device", "cpu"]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").glob("step_*")) / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def start(*arguments: str, processes: int = 0) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(ROOT / "tools/pretrain.py"), SMOKE, *QUICK, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(*arguments: str, processes: int = 0, code: int = 0) -> str:
    process = start(*arguments, processes=processes)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out + err


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def test_the_quickstart_file_is_the_default() -> None:
    assert load_config(PretrainConfig, ROOT / "configs/point_mae/quickstart.yaml") == PretrainConfig()
    assert load_config(PretrainConfig, None) == PretrainConfig()
    assert load_config(PretrainConfig, None, ["--data.points", "512"]).data == dataclasses.replace(PretrainConfig().data, points=512)
    assert load_config(PretrainConfig, None, ["--data.name", "objects"]).data == DATASETS.config("objects")  # chosen: its own defaults


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*ae/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_configurations_are_valid_and_come_back(path: Path) -> None:
    config = load_config(PretrainConfig, path)
    assert config.method.name == path.parent.name
    assert from_dict(PretrainConfig, read_yaml_text(to_yaml(config))) == config


def read_yaml_text(text: str) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text)
        return read_yaml(path)


@pytest.mark.parametrize("program", [PretrainConfig, FinetuneConfig])
def test_every_field_of_every_variant_is_documented(program: type) -> None:
    missing: list[str] = []

    def look(config: Any) -> None:
        docs = field_docs(type(config))
        for f in fields(config):
            if not docs.get(f.name):
                missing.append(f"{type(config).__name__}.{f.name}")
            value = getattr(config, f.name)
            if is_dataclass(value):
                look(value)
            for name in f.metadata["registry"].names() if "registry" in f.metadata else ():
                look(f.metadata["registry"].config(name))

    look(program())
    assert missing == []


def test_help_works_for_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    for name in DATASETS.names():
        with pytest.raises(SystemExit) as stopped:
            run("pretrain", ["--data.name", name, "--probe.data.name", name, "--help"])
        assert stopped.value.code == 0
        assert "--probe.data." in capsys.readouterr().out.replace("--probe.data.name", "")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_split_batch_keeps_everything_in_its_place() -> None:
    dataset = DATASETS.config("objects").build("test")
    whole = next(build_loader(dataset, 7, seed=0, rank=0))
    parts = split_batch(whole, 3)
    assert [len(part) for part in parts] == [2, 2, 3]
    assert {part.global_size for part in parts} == {7}
    for name in ("label", "index", "slot"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.points.coord for part in parts]), whole.points.coord)
    assert torch.equal(torch.cat([part.points.lengths for part in parts]), whole.points.lengths)


def test_split_batch_cuts_clouds_of_different_size_and_their_features() -> None:
    from dataclasses import replace

    from geossl.geometry import PackedPoints, PointBatch

    offsets = torch.tensor([0, 3, 3, 8])
    batch = PointBatch(PackedPoints(torch.randn(8, 3), offsets, torch.randn(8, 2)))
    first, second = split_batch(batch, 2)
    assert first.points.lengths.tolist() == [3]
    assert second.points.lengths.tolist() == [0, 5]
    assert torch.equal(second.points.feats, batch.points.feats[3:])
    assert (first.global_size, second.slot.tolist()) == (3, [1, 2])
    assert replace(first, slot=None).label is None


def test_micro_batches_continue_at_a_saved_position() -> None:
    dataset = DATASETS.config("objects").build("test")

    def stream() -> MicroBatches:
        return MicroBatches(build_loader(dataset, 8, seed=3), 4)

    expected = stream()
    seen = [next(expected) for _ in range(12)]
    first = stream()
    for _ in range(4):
        next(first)
    second = stream()
    next(second)  # in the middle of a batch when told to go elsewhere
    second.load_state_dict(first.state_dict())
    for batch in seen[4:]:
        assert torch.equal(next(second).points.coord, batch.points.coord)


# ---------------------------------------------------------------------------------------------------------------------
# One run, in this process


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run("pretrain", [SMOKE, *QUICK, "--train.run_folder", str(folder), "--train.keep", "9"]) == 0
    return folder


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "export", "report", "report.html")
    }
    assert [row["step"] for row in rows(finished)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "chamfer_x1000", "lr", "grad_norm"} <= set(rows(finished)[0])
    assert rows(finished)[-1]["loss"] < rows(finished)[0]["loss"]


def test_the_losses_are_those_on_record(finished: Path) -> None:
    """A change of the numbers is made on purpose and shows in review; rounding differs between processors."""
    recorded = [0.68668, 0.72803, 0.5003, 0.39465, 0.37373, 0.26544]
    assert [row["loss"] for row in rows(finished)] == pytest.approx(recorded, rel=0.02)


def test_the_export_is_a_backbone(finished: Path) -> None:
    backbone = geossl.load(finished)
    trained = {name.removeprefix("backbone."): value for name, value in weights(finished).items() if name.startswith("backbone.")}
    assert_same(backbone.state_dict(), trained)
    assert not backbone.training
    card = (finished / "export/README.md").read_text()
    assert "point_vit_tiny" in card
    assert "point_mae" in card


def test_the_written_configuration_starts_the_same_run(finished: Path, tmp_path: Path) -> None:
    config = load_config(PretrainConfig, finished / "config.yaml")
    assert config == load_config(PretrainConfig, SMOKE, [*QUICK, "--train.run_folder", str(finished), "--train.keep", "9"])
    again = tmp_path / "again"
    assert run("pretrain", [str(finished / "config.yaml"), "--train.run_folder", str(again)]) == 0
    assert rows(again) == rows(finished)
    assert_same(weights(again), weights(finished))


def test_a_run_is_not_overwritten_by_accident(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert run("pretrain", [SMOKE, *QUICK, "--train.run_folder", str(finished)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_overwriting_is_not_remembered(tmp_path: Path) -> None:
    flags = [SMOKE, *QUICK, "--train.run_folder", str(tmp_path / "run"), "--train.steps", "1"]
    assert run("pretrain", flags) == 0
    assert run("pretrain", [*flags, "--train.overwrite"]) == 0
    assert read_yaml(tmp_path / "run/config.yaml")["train"]["overwrite"] is False


def test_a_continued_run_tells_what_changed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    flags = [SMOKE, *QUICK, "--train.run_folder", str(folder)]
    assert run("pretrain", [*flags, "--train.steps", "2", "--resume", "auto"]) == 0  # nothing there yet: a fresh start
    assert run("pretrain", [*flags, "--train.steps", "4", "--optim.lr", "2e-3", "--resume", "auto"]) == 0
    err = capsys.readouterr().err
    assert "optim.lr 0.001 -> 0.002" in err
    assert "train.steps 2 -> 4" in err
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]


def test_another_models_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train.run_folder", str(finished), "--backbone.depth", "1", "--resume", "auto"]
    assert run("pretrain", [SMOKE, *QUICK, *flags]) == 2
    err = capsys.readouterr().err
    assert "belongs to another model" in err
    assert "unexpected (backbone.blocks" in err


def test_a_checkpoint_that_would_run_code(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    class Malicious:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = max((folder / "checkpoints").glob("step_*"))
    torch.save({"state": Malicious()}, newest / "optimizer.pt")
    manifest = json.loads((newest / "manifest.json").read_text())
    content = (newest / "optimizer.pt").read_bytes()
    manifest["files"]["optimizer.pt"] = {"bytes": len(content), "crc32": zlib.crc32(content)}  # an attacker can do that, too
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert run("pretrain", [SMOKE, *QUICK, "--train.run_folder", str(folder), "--resume", "auto"]) == 2
    assert "could run code" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.stepz", "3"], "unknown flag '--train.stepz'; did you mean '--train.steps'"),
        (["--steps", "3"], "did you mean '--train.steps'"),
        (["--method.name", "point_mea"], "method.name: unknown method 'point_mea'; did you mean 'point_mae'"),
        (["--backbone.name", "point_vit_tyni"], "backbone.name: unknown backbone 'point_vit_tyni'; did you mean 'point_vit_tiny'"),
        (["--train.steps", "many"], "--train.steps"),
        (["--train.precision", "bf32"], "--train.precision"),
        (["--data.points", "1"], "data.points must be at least 2, got 1"),
        (["--data.points", "100000"], "data.points must be at most 1024"),
        (["--method.mask_ratio", "1.5"], "method.mask_ratio must lie strictly between 0 and 1, got 1.5"),
        (["--train.batch_size", "100000"], "train.batch_size must not be more than the data set"),
        (["--train.batch_size", "9", "--train.accumulate", "2"], "train.batch_size: 9 does not divide by the 1 processes times"),
        (["--data.name", "shapenet55", "--data.root", "absent"], "absent"),
        (["--data.columns", "xyz+normal"], "in_channels is 3, but data set objects gives 6 numbers a point (xyz, normal)"),
        (
            ["--probe.every", "1", "--probe.data.name", "objects", "--probe.data.columns", "all"],
            "probe.data objects gives xyz, normal, rgb, data objects xyz",
        ),
        (["--backbone.heads", "5"], "backbone.heads must divide dim"),
        (["--resume", "elsewhere"], "elsewhere: no checkpoint there"),
        (["--train.parallel", "fsdp"], "needs torchrun"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("pretrain", [SMOKE, *QUICK, *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert len([line for line in printed.err.splitlines() if not line.startswith("warning: ")]) == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pretrain", [str(tmp_path / "absent.yaml")]) == 2
    (tmp_path / "bad.yaml").write_text("method: {name: point_mae, mask_ration: 0.6}\n")
    assert run("pretrain", [str(tmp_path / "bad.yaml")]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "cannot read the configuration file" in err[0]
    assert "bad.yaml: unknown key 'method.mask_ration'; did you mean 'method.mask_ratio'" in err[1]


@pytest.fixture
def clouds(tmp_path: Path) -> Path:
    folder = tmp_path / "clouds"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        np.save(folder / f"{number}.npy", random.normal(size=(200, 3)).astype(np.float32))
    return folder


def test_data_without_classes_is_pretrained_on_but_not_probed(clouds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    flags = ["--data.name", "folder", "--data.root", str(clouds), "--data.points", "128", "--probe.every", "1", "--probe.report"]
    assert run("pretrain", [SMOKE, *QUICK, *flags, "--train.steps", "2", "--train.run_folder", str(folder)]) == 0
    assert "has no classes" in capsys.readouterr().err
    assert not any("probe/svm" in row for row in rows(folder))
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("damage", ["nan", "one_point", "columns", "truncated"])
def test_damaged_data_ends_in_one_error_that_names_the_file(
    clouds: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)
    if damage == "nan":
        bad[3, 1] = np.nan
    np.save(clouds / "5.npy", {"one_point": bad[:1], "columns": bad[:, :2]}.get(damage, bad))
    if damage == "truncated":
        (clouds / "5.npy").write_bytes((clouds / "5.npy").read_bytes()[:100])
    flags = ["--data.name", "folder", "--data.root", str(clouds), "--data.points", "128", "--train.run_folder", str(tmp_path / "run")]
    assert run("pretrain", [SMOKE, *QUICK, *flags, "--train.batch_size", "11"]) == 2
    err = capsys.readouterr().err
    assert "5.npy" in err
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------------
# The command line, for real


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_kill_9_and_resume_is_bit_equal(tmp_path: Path, workers: str) -> None:
    flags = ("--train.steps", "14", "--train.save_every", "3", "--train.ema", "0.9", "--train.workers", workers, "--method.mask", "block")
    flags += ("--backbone.drop_path", "0.3", "--data.augment.jitter", "0.01", "--data.points", "256", "--train.batch_size", "32")
    finish(*flags, "--train.run_folder", str(tmp_path / "straight"))
    folder = tmp_path / "killed"
    process = start(*flags, "--train.run_folder", str(folder))
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 7:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(rows(folder)) < 14
    assert "continuing at step" in finish(*flags, "--train.run_folder", str(folder), "--resume", "auto")
    assert rows(folder) == rows(tmp_path / "straight")
    for name in ("model", "ema"):
        file = f"checkpoints/step_00000014/{name}.safetensors"
        assert_same(load_file(folder / file), load_file(tmp_path / "straight" / file))
    exported = load_file(folder / "export/model.safetensors")
    assert_same(exported, load_file(tmp_path / "straight/export/model.safetensors"))
    assert_same(exported, geossl.load(folder / "checkpoints/step_00000014").state_dict())
    assert load_config(PretrainConfig, folder / "config.yaml").train.workers == int(workers)


@pytest.mark.slow
def test_sigint_ends_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start("--train.run_folder", str(folder), "--train.steps", "100000", "--train.workers", "1")
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "SIGINT: stopped after step" in err
    assert "--resume auto" in err
    newest = folder / f"checkpoints/step_{rows(folder)[-1]['step']:08d}"
    assert newest == max((folder / "checkpoints").glob("step_*"))
    with pytest.raises(CheckpointError, match=f"has not reached its end.*--resume auto, or take a checkpoint: {newest}"):
        geossl.load(folder)
    trained = {name.removeprefix("backbone."): value for name, value in load_file(newest / "model.safetensors").items()}
    backbone = geossl.load(newest).state_dict()
    assert_same(backbone, {name: trained[name] for name in backbone})


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(finished: Path, tmp_path: Path, parallel: str) -> None:
    folder = tmp_path / "run"
    out = finish("--train.run_folder", str(folder), "--train.parallel", parallel, "--probe.every", "3", processes=2)
    assert out.count("step 6/6") == 1
    ours = [row["loss"] for row in rows(folder) if "loss" in row]
    assert ours == pytest.approx([row["loss"] for row in rows(finished)], rel=2e-4)
    assert any("probe/svm" in row for row in rows(folder))
    for name, value in weights(finished).items():
        if not name.startswith("backbone.embed."):  # biases before a BatchNorm: no gradient but rounding, which AdamW blows up
            torch.testing.assert_close(weights(folder)[name], value, rtol=1e-2, atol=2e-4, msg=name)
    assert geossl.load(folder)
    assert (folder / "report.html").exists()


def test_tokens_of_events_are_probed_while_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    flags = ["--train.steps", "2", "--train.batch_size", "2", "--train.log_every", "1", "--train.device", "cpu", "--data.events", "4"]
    flags += ["--backbone.dim", "24", "--backbone.embed_widths", "8", "16", "16", "--data.val_events", "2", "--probe.tokens", "200"]
    flags += ["--train.run_folder", str(folder), "--probe.every", "1"]
    assert run("pretrain", [str(ROOT / "configs/polar_mae/smoke.yaml"), *flags]) == 0
    probed = [row for row in rows(folder) if "probe/token_f1" in row]
    assert [row["step"] for row in probed] == [1, 2]
    assert {"probe/token_f1_shower", "probe/token_f1_track"} <= set(probed[0])
    summary = json.loads((folder / "report/token_probe.json").read_text())
    assert summary["score"]["macro_f1"] == pytest.approx(probed[-1]["probe/token_f1"])
    assert set(np.load(folder / "report/events.npz")["classes"]) == {"shower", "track", "michel", "delta"}
    assert run("pretrain", [str(ROOT / "configs/polar_mae/smoke.yaml"), *flags, "--train.overwrite", "--probe.layers", "0"]) == 2
    assert "probe.layers: tokens of events are probed as the last block leaves them" in capsys.readouterr().err
