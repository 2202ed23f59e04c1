"""The training loop: one step one can read, and everything that makes a run survive.

A step takes the micro-batches of one global batch, accumulates their gradients, clips, asks all processes whether loss and gradients
are finite, updates, and moves the average. Between steps it logs, probes and writes checkpoints. The loop knows a method only by
its protocol, ``module(batch, generator=...)`` returning an object with ``loss`` and ``metrics``, and the data only as an endless
iterator of batches with ``len()``, ``to()`` (as that of a tensor) and ``global_size``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from geossl.config import require
from geossl.engine.checkpoint import (
    check_state,
    find_checkpoint,
    prune_checkpoints,
    read_state,
    read_tensors,
    step_of,
    write_checkpoint,
    write_text_atomically,
)
from geossl.engine.distributed import World, stop_world
from geossl.engine.ema import EMA
from geossl.engine.guard import NonFiniteError, save_offending
from geossl.engine.interrupt import StopRequest
from geossl.engine.log import RunLog, Stopwatch
from geossl.engine.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from geossl.engine.parallel import Parallel
from geossl.engine.profile import Profiler
from geossl.engine.run_folder import check_run_folder, prepare_run_folder
from geossl.engine.seeds import capture_rng, preserved_rng, restore_rng, step_generator, use_deterministic_algorithms
from geossl.errors import CheckpointError, ConfigError

log = logging.getLogger("geossl")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, size and machinery of a training."""

    run_folder: Path = Path("runs/default")
    """Everything the run writes goes here."""
    overwrite: bool = False
    """Replace a run that is already in run_folder."""
    steps: int = 1000
    """Optimiser steps."""
    epochs: int | None = None
    """Passes over the data; when given, it sets the number of steps."""
    batch_size: int = 32
    """Samples per optimiser step, over all processes and accumulated micro-batches."""
    accumulate: int = 1
    """Micro-batches per optimiser step of each process. Equal to the big batch, save that BatchNorm sees one micro-batch at a time, and
    that where samples have different numbers of tokens (point_m2ae, i2p_mae) a micro-batch counts by its samples."""
    workers: int = 0
    """Worker processes that load data, for each training process."""
    seed: int = 0
    """Seed of the initial weights, the order and augmentation of the data, and all masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes CUDA where there is a device."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Matrix products in this type (autocast); fp16 scales the loss. Weights and optimiser stay float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: whole weights in each (ddp) or a part in each (fsdp, needs torchrun)."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then what is probed and exported; 0 keeps none."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the module with torch.compile."""
    deterministic: bool = False
    """Refuse operators whose result varies from run to run (GPU); slower."""
    profile: bool = False
    """Trace steps 3 to 5 after the start into run_folder/profile."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints kept, beside the best one."""
    max_nonfinite: int = 5
    """Stop after this many steps in a row whose loss or gradients are not finite."""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep", "max_nonfinite"):
            require(getattr(self, key) >= 1, key, "must be at least 1", getattr(self, key))
        require(self.epochs is None or self.epochs >= 1, "epochs", "must be at least 1, or null", self.epochs)
        require(self.workers >= 0, "workers", "must not be negative", self.workers)
        require(self.seed >= 0, "seed", "must not be negative", self.seed)
        require(0 <= self.ema < 1, "ema", "must lie in [0, 1)", self.ema)
        require(
            not (self.precision == "fp16" and self.parallel == "fsdp"),
            "precision",
            "must be fp32 or bf16 with parallel fsdp",
            self.precision,
        )


class BatchLoader(Protocol):
    """What the loop needs of a loader: an endless iterator of micro-batches whose position can be saved."""

    batches_per_epoch: int
    """Optimiser steps in one pass over the data."""

    def __next__(self) -> Any:
        """Return the next micro-batch of this process."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch not yet handed out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position."""

    def close(self) -> None:
        """Stop worker processes, if there are any."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls without knowing what it does; main process only, weights in evaluation mode, averaged if there is an EMA."""

    probe: Callable[[nn.Module], dict[str, float]] | None = None
    """Scores of the module, every ``probe_every`` steps and at the end."""
    probe_every: int = 0
    """Steps between two probes; 0 never probes."""
    best: str = ""
    """Score whose highest value decides which checkpoint is the best; with a minus before it (``-EPE``), the lowest; empty keeps none."""
    export: Callable[[nn.Module, Path], Any] | None = None
    """Writes the trained module into a folder, at the end."""
    report: Callable[[nn.Module, Path], Any] | None = None
    """Makes the report of the run folder, at the very end. The process group is left by then: it may compute as it likes."""


@dataclass(frozen=True)
class Result:
    """How a call of :func:`train` ended: ``step`` of ``total`` done, stopped by ``signal`` (None: finished), last probe ``scores``."""

    step: int
    total: int
    signal: int | None = None
    scores: dict[str, float] = field(default_factory=dict)


def train(
    module: nn.Module,
    loader: BatchLoader,
    config: TrainConfig,
    optim: OptimConfig,
    world: World,
    *,
    hooks: Hooks | None = None,
    resume: str = "none",
    settings: str = "",
) -> Result:
    """Train ``module`` on the batches of ``loader`` and leave a complete run folder.

    Args:
        module: Method or task; called as ``module(batch, generator=generator)``.
        loader: Yields ``config.accumulate`` micro-batches for each step; this process's share of them.
        config: Length, size and machinery.
        optim: Optimiser and schedule.
        world: The processes, from :func:`geossl.engine.start_world`.
        hooks: Probe, export and report.
        resume: ``none``, ``auto`` (the newest intact checkpoint of the run folder, if any) or the path of a checkpoint or run folder.
        settings: The resolved configuration as YAML, written into the run folder.

    Returns:
        How it ended. After SIGTERM or SIGINT a checkpoint is written and ``signal`` says which it was. The process group is left when the
        training is complete.

    Raises:
        ConfigError: the run folder holds another run.
        CheckpointError: no checkpoint can be continued, it belongs to another model, or one could not be written.
        NonFiniteError: loss or gradients were not finite ``config.max_nonfinite`` times in a row.
    """
    folder = config.run_folder
    found = world.from_main(find_checkpoint(resume, folder) if world.is_main else None)
    continued = found is not None and found.resolve().parent == (folder / "checkpoints").resolve()
    if world.is_main:
        start = step_of(found) if found is not None and continued else None
        check_run_folder(folder, overwrite=config.overwrite, automatic=resume == "auto", start=start)
    trainer = Trainer(module, loader, config, optim, world, hooks or Hooks())
    if found is not None:
        trainer.load(found)
    if world.is_main:
        prepare_run_folder(folder, settings, fresh=not continued)
    try:
        return trainer.run()
    finally:
        loader.close()


class Trainer:
    """The state of a training and what is done with it. Everything a checkpoint must hold is set in ``__init__`` and listed in ``save``."""

    def __init__(self, module: nn.Module, loader: BatchLoader, config: TrainConfig, optim: OptimConfig, world: World, hooks: Hooks) -> None:
        self.module, self.loader, self.config, self.optim, self.world, self.hooks = module, loader, config, optim, world, hooks
        if config.deterministic:
            use_deterministic_algorithms()
        if config.grad_checkpointing:
            switch = getattr(module, "set_grad_checkpointing", None)
            if switch is None:
                raise ConfigError(f"train.grad_checkpointing: {type(module).__name__} does not offer it; leave it off")
            switch(True)
        module.to(world.device).train()
        self.parallel = Parallel(module, config.parallel, world)
        if config.compile:
            module.compile()
        self.optimizer = build_optimizer(module, optim)
        self.ema = EMA(module, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.total = config.epochs * loader.batches_per_epoch if config.epochs else config.steps
        self.step = 0
        self.best: dict[str, Any] | None = None  # step, name and value of the best probe score
        self.nonfinite_in_a_row = 0
        self.scores: dict[str, float] = {}
        self.request = StopRequest()
        self.stop = False  # agreed by all processes
        self.watch = Stopwatch()
        self.log: RunLog | None = None

    # ---------------------------------------------------------------------------------------------------------------
    # One step

    def train_step(self, batches: list[Any], record: bool) -> tuple[dict[str, Tensor], bool]:
        """Take one optimiser step, unless loss or gradients are not finite in any process.

        Args:
            batches: This process's micro-batches.
            record: Whether the metrics of this step will be logged.

        Returns:
            Scalars on the device (``loss`` is this process's share of the mean over the global batch), and whether the step was taken.
        """
        rng = capture_rng()
        device, config = self.world.device, self.config
        set_learning_rate(self.optimizer, learning_rate(self.optim, self.step, self.total, self.loader.batches_per_epoch))
        sums = {"loss": torch.zeros((), device=device)}
        for number, batch in enumerate(batches):
            share = len(batch) / batch.global_size if getattr(batch, "global_size", None) else 1 / (len(batches) * self.world.size)
            with self.parallel.accumulating(last=number == len(batches) - 1):
                with torch.autocast(device.type, DTYPES.get(config.precision), enabled=config.precision != "fp32"):
                    loss, metrics = self.parallel.forward(
                        batch.to(device, non_blocking=True), generator=step_generator(config.seed, self.step)
                    )
                # Gradients are averaged over the processes; `share` makes them those of the mean over the global batch.
                self.scaler.scale(loss * (share * self.world.size)).backward()
            sums["loss"] += share * loss.detach()
            for name, value in metrics.items() if record else ():
                sums[name] = sums.get(name, 0.0) + share * value.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.optim.clip or float("inf"))
        sums["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        taken = self._update(sums, batches, rng)
        self.optimizer.zero_grad(set_to_none=True)
        return sums, taken

    def _update(self, sums: dict[str, Tensor], batches: list[Any], rng: dict[str, Any]) -> bool:
        """Let the optimiser act if all processes found loss and gradients finite; the one place where a step waits for the device."""
        found = (~sums["loss"].isfinite(), ~sums["grad_norm"].isfinite(), self.request.signal is not None)
        bad_loss, bad_norm, self.stop = self.world.any(*found)
        # With a scaled loss, gradients overflow now and then by design: the scaler skips such steps and lowers its scale.
        scaling = bad_norm and not bad_loss and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if (bad_loss or bad_norm) and not scaling:
            self.scaler.update()
            self._refuse(sums, batches, rng)
            return False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if scaling:
            return False
        self.nonfinite_in_a_row = 0
        if self.ema:
            self.ema.update(self.step + 1)
        return True

    def _refuse(self, sums: dict[str, Tensor], batches: list[Any], rng: dict[str, Any]) -> None:
        """Keep the offending batch, and stop when this goes on."""
        config, self.nonfinite_in_a_row = self.config, self.nonfinite_in_a_row + 1
        found = {"loss": float(sums["loss"]), "grad_norm": float(sums["grad_norm"])}
        path = save_offending(
            config.run_folder, step=self.step, rank=self.world.rank, seed=config.seed, batches=batches, rng=rng, found=found
        )
        log.warning(
            "step %d: loss %g and gradient norm %g are not both finite; step skipped, batch kept in %s", self.step, *found.values(), path
        )
        if self.nonfinite_in_a_row >= config.max_nonfinite:
            raise NonFiniteError(
                f"loss or gradients were not finite for {self.nonfinite_in_a_row} steps in a row, the last being step {self.step}. "
                f"The batches are in {config.run_folder}/nonfinite_step_*.pt; lower optim.lr, set optim.clip, or use precision fp32 or bf16"
            )

    # ---------------------------------------------------------------------------------------------------------------
    # The run

    def run(self) -> Result:
        """Step until the end or until a signal asks to stop; then write a checkpoint, and at the end also export and report."""
        config = self.config
        saved = self.step
        with self.request, contextlib.ExitStack() as closing:
            if self.world.is_main:
                self.log = RunLog(config.run_folder, self.step, self.total)
                closing.callback(self.log.close)
            profiler = closing.enter_context(Profiler(config.run_folder / "profile", enabled=config.profile and self.world.is_main))
            while self.step < self.total and not self.stop:
                batches = self._fetch()
                if batches:
                    self._one_step(batches)
                    profiler.step()
                last = self.stop or self.step == self.total
                improved = not self.stop and self._due(self.hooks.probe_every) and self._probe()
                if (improved or last or self.step % config.save_every == 0) and self.step != saved:
                    self.save()
                    saved = self.step
        if not self.stop:
            self._finish()
        stopped_by = (self.request.signal or signal.SIGTERM) if self.stop else None
        return Result(self.step, self.total, stopped_by, self.scores)

    def _fetch(self) -> list[Any]:
        """Take the micro-batches of one step; none when a signal has ended the loader's workers."""
        begin = time.perf_counter()
        try:
            return [next(self.loader) for _ in range(self.config.accumulate)]
        except RuntimeError:
            if self.request.signal is None or self.world.size > 1:
                raise
            self.stop = True
            return []
        finally:
            self.watch.waited(time.perf_counter() - begin)

    def _one_step(self, batches: list[Any]) -> None:
        record = (self.step + 1) % self.config.log_every == 0 or self.step + 1 == self.total
        sums, taken = self.train_step(batches, record)
        self.step += 1
        self.watch.step(self.config.batch_size)
        if record or not taken:
            self._record(sums, taken)

    def _record(self, sums: dict[str, Tensor], taken: bool) -> None:
        """Write a row of metrics, averaged over all processes."""
        names = [name for name in sums if name != "grad_norm"]
        means = self.world.sum(torch.stack([sums[name].float() for name in names])).tolist()
        if self.log is None:
            return
        row: dict[str, Any] = dict(zip(names, means, strict=True))
        row |= {"grad_norm": float(sums["grad_norm"]), "lr": max(group["lr"] for group in self.optimizer.param_groups), **self.watch.read()}
        row["eta"] = round((self.total - self.step) * self.watch.seconds_per_step, 1)
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
        if not taken:
            row["skipped"] = True
        self.log.row(self.step, row)
        self.log.progress(self.step, row)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.total)

    @contextlib.contextmanager
    def _evaluated(self) -> Iterator[nn.Module | None]:
        """The whole module with the weights to be judged, on the main process (None elsewhere); random states are left as they were."""
        begin = time.perf_counter()
        with preserved_rng(), self.ema.applied() if self.ema else contextlib.nullcontext(), self.parallel.whole_module() as module:
            yield module
        self.watch.paused(time.perf_counter() - begin)

    def _probe(self) -> bool:
        """Score the module; True when the best score so far was reached."""
        with self._evaluated() as module:
            scores = self.hooks.probe(module) if module is not None and self.hooks.probe is not None else {}
        self.scores, best = self.world.from_main((scores, self.hooks.best))  # whether to save is the same in every process
        if self.log is not None and self.scores:
            self.log.row(self.step, {f"probe/{name}": value for name, value in self.scores.items()})
            log.info("step %d: probe %s", self.step, "  ".join(f"{name} {value:.4g}" for name, value in self.scores.items()))
        sign, name = (-1, best[1:]) if best.startswith("-") else (1, best)
        value = self.scores.get(name)
        if value is None or math.isnan(value) or (self.best is not None and sign * value <= sign * self.best["value"]):
            return False
        self.best = {"step": self.step, "name": name, "value": value}
        return True

    def _finish(self) -> None:
        folder = self.config.run_folder
        with self._evaluated() as module:
            if module is not None and self.hooks.export is not None:
                self.hooks.export(module, folder / "export")
            stop_world()
            if module is not None and self.hooks.report is not None:
                self.hooks.report(module, folder)

    # ---------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint and delete those no longer wanted."""
        begin = time.perf_counter()
        tensors = {"model": self.parallel.model_state()}
        if self.ema:
            with self.ema.applied():
                tensors["ema"] = {name: value.clone() for name, value in self.parallel.model_state().items()}
        trainer = {
            "step": self.step,
            "rng": self.world.gather(capture_rng()),
            "loader": self.loader.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }
        states = {"optimizer": self.parallel.optimizer_state(self.optimizer), "trainer": trainer}
        problem = None
        if self.world.is_main:
            root = self.config.run_folder / "checkpoints"
            try:
                write_checkpoint(root, self.step, tensors, states)
            except CheckpointError as error:
                problem = error
            else:
                if self.best is not None:
                    write_text_atomically(root / "best.json", json.dumps(self.best) + "\n")
                prune_checkpoints(root, self.config.keep, self.best["step"] if self.best else None)
        if self.log is not None:
            self.log.flush()
        problem = self.world.from_main(problem)
        if problem is not None:
            raise problem
        self.watch.paused(time.perf_counter() - begin)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in ``folder``.

        Raises:
            CheckpointError: it belongs to another model, cannot be read, or would run code.
        """
        self._load_module(folder)
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        optimizer, trainer = read_state(folder / "optimizer.pt"), read_state(folder / "trainer.pt")
        try:
            self.parallel.load_optimizer_state(self.optimizer, optimizer)
            self.loader.load_state_dict(trainer["loader"])
            self.step, self.best, self.nonfinite_in_a_row = trainer["step"], trainer["best"], trainer["nonfinite_in_a_row"]
            if self.scaler.is_enabled() and trainer["scaler"]:
                self.scaler.load_state_dict(trainer["scaler"])
            states = trainer["rng"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not hold the state of this training: {error!r}") from error
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # the present configuration decides, not that of the saved run
        if len(states) != self.world.size:
            log.warning("continuing a run of %d processes with %d: not bit for bit the same", len(states), self.world.size)
        if self.world.rank < len(states):
            restore_rng(states[self.world.rank])
        if self.step >= self.total:
            log.info("%s is complete already: %d of %d steps are done", folder, self.step, self.total)
        elif self.world.is_main:
            log.info("continuing at step %d of %d from %s", self.step, self.total, folder)

    def _load_module(self, folder: Path) -> None:
        expected = self.module.state_dict()
        model = read_tensors(folder / "model.safetensors")
        check_state(expected, model, str(folder))
        if self.ema and (folder / "ema.safetensors").exists():
            average = read_tensors(folder / "ema.safetensors")
            check_state(expected, average, str(folder / "ema.safetensors"))
            self.parallel.load_model_state(average)
            self.ema.reset()
        self.parallel.load_model_state(model)
        if self.ema and not (folder / "ema.safetensors").exists():
            log.warning("%s has no moving average: it starts from the weights there", folder)
            self.ema.reset()
