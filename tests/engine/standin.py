"""A whole program around the engine in miniature: an autoencoder of random vectors. Run it as a script, or use its parts in tests."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from geossl.config import load_config, split_arguments, to_yaml
from geossl.engine import Hooks, OptimConfig, Result, TrainConfig, World, seed_everything, start_world, stop_world, train
from geossl.errors import GeosslError

WIDTH = 6


@dataclass(frozen=True)
class Batch:
    points: Tensor  # [B, WIDTH]
    slot: Tensor  # [B]
    global_size: int

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return replace(self, points=self.points.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Output:
    loss: Tensor
    metrics: dict[str, Tensor]


class Autoencoder(nn.Module):
    def __init__(self, hidden: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, WIDTH))
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, hidden), nn.Linear(hidden, hidden)])
        self.head = nn.Linear(hidden, WIDTH)
        self.dropout = dropout
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch, *, generator: torch.Generator | None = None) -> Output:
        noise = torch.rand(batch.global_size, WIDTH, generator=generator)[batch.slot]
        x = batch.points + 0.1 * noise.to(batch.points) + self.token
        for block in self.blocks:
            x = nn.functional.dropout(block(x).relu(), self.dropout, self.training)  # draws from the global random state
        if self.training:
            self.seen += 1
        error = (self.head(x) - batch.points).square().mean()
        return Output(error.float(), {"error_x1000": 1000 * error.detach()})

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def layer_groups(self) -> list[list[str]]:
        return [["token"], ["blocks.0"], ["blocks.1"], ["head"]]

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        self.checkpointing = enabled


class Vectors:
    """Endless micro-batches of 40 fixed vectors; `poison` lists optimiser steps whose batch holds a NaN."""

    def __init__(self, batch_size: int, accumulate: int = 1, world: World | None = None, poison: tuple[int, ...] = ()) -> None:
        world = world or World(torch.device("cpu"))
        self.data = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(7))
        self.batch_size, self.accumulate, self.rank, self.ranks, self.poison = batch_size, accumulate, world.rank, world.size, poison
        self.batches_per_epoch = 40 // batch_size
        self.position = 0  # micro-batches handed out
        self.closed = False

    def __next__(self) -> Batch:
        step, micro = divmod(self.position, self.accumulate)
        self.position += 1
        part, parts = self.rank * self.accumulate + micro, self.ranks * self.accumulate
        slot = torch.arange(self.batch_size * part // parts, self.batch_size * (part + 1) // parts)
        points = self.data[(step * self.batch_size + slot) % 40].clone()
        if step in self.poison and 0 in slot:
            points[0, 0] = torch.nan
        return Batch(points, slot, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.position // self.accumulate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["step"] * self.accumulate

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True, kw_only=True)
class Program:
    """The stand-in."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2, warmup=3, clip=1.0))
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=12, batch_size=8, log_every=1, save_every=4, device="cpu"))
    hidden: int = 8
    dropout: float = 0.1
    probe_every: int = 0
    resume: str = "none"
    step_delay: float = 0.0
    """Seconds each step waits for data."""
    sync_delay: float = 0.0
    """Seconds each fsync takes, so that a test can kill in the middle of a save."""
    poison: tuple[int, ...] = ()


def score(module: nn.Module) -> dict[str, float]:
    data = Vectors(40)
    torch.rand(3)  # a careless probe
    with torch.no_grad():
        return {"score": -float(module(next(data), generator=torch.Generator().manual_seed(0)).loss)}


def export(module: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(module.state_dict()), folder / "model.safetensors")


def run(program: Program, world: World | None = None) -> Result:
    world = world or World(torch.device("cpu"))
    seed_everything(program.train.seed)
    module = Autoencoder(program.hidden, program.dropout)
    loader = Vectors(program.train.batch_size, program.train.accumulate, world, program.poison)
    if program.step_delay:
        inner = loader.__next__
        loader.__class__ = type("Slow", (Vectors,), {"__next__": lambda self: (time.sleep(program.step_delay), inner())[1]})
    hooks = Hooks(probe=score, probe_every=program.probe_every, best="score", export=export)
    return train(module, loader, program.train, program.optim, world, hooks=hooks, resume=program.resume, settings=to_yaml(program))


def main() -> int:
    path, flags = split_arguments(sys.argv[1:])
    try:
        program = load_config(Program, path, flags)
        if program.sync_delay:
            import geossl.engine.checkpoint as checkpoint

            checkpoint.os = type("SlowOS", (), {**vars(os), "fsync": staticmethod(lambda fd: time.sleep(program.sync_delay))})
        world = start_world(program.train.device, program.train.parallel)
        torch.set_num_threads(1)
        result = run(program, world)
    except GeosslError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stop_world()
    return 128 + result.signal if result.signal else 0


if __name__ == "__main__":
    sys.exit(main())
