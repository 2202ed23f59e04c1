from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from geossl.engine import checkpoint
from geossl.engine.checkpoint import (
    check_state,
    damage,
    find_checkpoint,
    list_checkpoints,
    newest_intact,
    prune_checkpoints,
    read_state,
    read_tensors,
    remove_unfinished,
    write_checkpoint,
    write_text_atomically,
)
from geossl.errors import CheckpointError


def write(root: Path, step: int, size: int = 10) -> Path:
    tensors = {"model": {"weight": torch.full((size,), float(step)), "count": torch.tensor(step)}}
    return write_checkpoint(root, step, tensors, {"trainer": {"step": step, "rng": [torch.get_rng_state()]}})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    assert folder == tmp_path / "step_00000003"
    assert damage(folder) is None
    assert torch.equal(read_tensors(folder / "model.safetensors")["weight"], torch.full((10,), 3.0))
    assert read_state(folder / "trainer.pt")["step"] == 3
    assert names(tmp_path) == ["step_00000003"]


def test_tied_and_transposed_tensors(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    folder = write_checkpoint(tmp_path, 1, {"model": {"a": weight, "b": weight, "c": weight.T}}, {})
    state = read_tensors(folder / "model.safetensors")
    assert torch.equal(state["a"], weight)
    assert torch.equal(state["b"], weight)
    assert torch.equal(state["c"], weight.T)


@pytest.mark.parametrize("failing", ["model.safetensors", "trainer.pt", "manifest.json"])
def test_full_disk_leaves_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    write(tmp_path, 1)
    real = checkpoint._write_synced

    def full(path: Path, writer) -> None:
        if path.name == failing:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, writer)

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device; earlier checkpoints are untouched.*step_00000001"):
        write(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001"]
    assert newest_intact(tmp_path) == tmp_path / "step_00000001"


def test_a_real_write_error_of_torch_and_safetensors(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the system itself refuse to write on, as a full disk does, wherever the library is at that moment."""
    write(tmp_path, 1)
    program = """
        import resource, signal, sys, torch
        from pathlib import Path
        from geossl.engine.checkpoint import write_checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = torch.zeros(100_000)
        tensors, states = ({"model": {"a": big}}, {}) if sys.argv[2] == "tensors" else ({}, {"trainer": big})
        try:
            write_checkpoint(Path(sys.argv[1]), 2, tensors, states)
        except Exception as error:
            print(type(error).__name__, error)
    """
    for kind in ("tensors", "states"):
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert done.stdout.startswith("CheckpointError could not write the checkpoint of step 2"), done.stdout + done.stderr
        assert names(tmp_path) == ["step_00000001"]
        assert damage(tmp_path / "step_00000001") is None


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    (write(tmp_path, 2) / "trainer.pt").unlink()
    write(tmp_path, 2)
    assert damage(tmp_path / "step_00000002") is None
    assert names(tmp_path) == ["step_00000002"]


def break_size(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(20)


def break_bit(folder: Path) -> None:
    content = bytearray((folder / "trainer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "trainer.pt").write_bytes(content)


def break_missing(folder: Path) -> None:
    (folder / "trainer.pt").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def break_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_format(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))


BREAKS = [break_size, break_bit, break_missing, break_manifest, break_no_manifest, break_format]


@pytest.mark.parametrize("breaking", BREAKS)
def test_resuming_takes_the_newest_intact_one(tmp_path: Path, breaking, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        write(root, step)
    breaking(write(root, 3))
    assert find_checkpoint("auto", tmp_path) == root / "step_00000002"
    assert "step_00000003 is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="step_00000003 is damaged"):
        find_checkpoint(str(root / "step_00000003"), tmp_path)
    for step in (1, 2):
        breaking(root / f"step_{step:08d}")
    with pytest.raises(CheckpointError, match="all 3 checkpoints"):
        find_checkpoint("auto", tmp_path)


def test_find_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    newest = [write(tmp_path / "checkpoints", step) for step in (9, 10)][-1]
    assert find_checkpoint("none", tmp_path) is None
    for resume in ("auto", str(tmp_path), str(newest)):
        assert find_checkpoint(resume, tmp_path) == newest
    for wrong in (str(tmp_path / "absent"), str(tmp_path / "checkpoints"), "yes"):
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            find_checkpoint(wrong, tmp_path)


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 100_000_000):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, keep=2, best_step=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_100000000", "step_00000003", "step_00000001"]


def test_remove_unfinished(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".writing_00000002_abc").mkdir()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["step_00000001"]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("saving", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, saving: str) -> None:
    path, target = tmp_path / "optimizer.pt", tmp_path / "executed"
    if saving == "torch":
        torch.save({"state": Malicious(target)}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(CheckpointError, match=r"refused to read .*optimizer\.pt: .* could run code"):
        read_state(path)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"no archive at all"])
def test_unreadable_files(tmp_path: Path, content: bytes) -> None:
    for name, read in (("a.pt", read_state), ("a.safetensors", read_tensors)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read(tmp_path / name)
        with pytest.raises(CheckpointError, match="absent"):
            read(tmp_path / "absent")


def test_another_models_state_is_listed() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    check_state(expected, dict(expected), "x")
    with pytest.raises(CheckpointError) as caught:
        check_state(expected, {"a": torch.zeros(3), "b": torch.zeros(2), "d": torch.zeros(2)}, "x")
    assert str(caught.value) == "x belongs to another model: 1 missing (c); 1 unexpected (d); 1 mismatched (a [3] instead of [2])"


def test_write_text_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")

    def fail(path: Path, writer) -> None:
        path.write_text("ha")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint, "_write_synced", fail)
    with pytest.raises(OSError, match="full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == dict.fromkeys(names(folder), "0o644")


def test_safetensors_can_be_opened_by_anyone(tmp_path: Path) -> None:
    assert set(safetensors.torch.load_file(write(tmp_path, 1) / "model.safetensors")) == {"weight", "count"}
