"""Batches in a fixed order, whatever the number of workers, processes or restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from geossl.config import require
from geossl.data.dataset import SampleSource
from geossl.data.sample import collate
from geossl.errors import ConfigError, DataError
from geossl.geometry import Batch

_ORDER, _SAMPLE = 0, 1  # what a generator is for: the order of an epoch, or one sample


def sample_rng(seed: int, epoch: int, row: int) -> np.random.Generator:
    """Return the generator of sample ``row`` in ``epoch``: every random choice about the sample is drawn from it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_SAMPLE, epoch, row)))


def epoch_rng(seed: int, epoch: int) -> np.random.Generator:
    """Return the generator from which a data set draws the order of its rows in ``epoch``."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch)))


@dataclass
class _Batches(TorchDataset):
    """Makes this process's micro-batch ``number``, counted from 0 over all epochs; runs in the workers."""

    dataset: SampleSource
    batch_size: int
    seed: int
    rank: int
    world_size: int
    accumulate: int
    shuffle: bool
    drop_last: bool
    augment: bool

    def __post_init__(self) -> None:
        count = len(self.dataset)
        self.per_epoch = count // self.batch_size if self.drop_last else -(-count // self.batch_size)
        self._order: tuple[int, np.ndarray] | None = None

    def _epoch_rows(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = self.dataset.order(epoch_rng(self.seed, epoch)) if self.shuffle else np.arange(len(self.dataset))
            self._order = (epoch, order)
        return self._order[1]

    def __getitem__(self, number: int) -> Batch | DataError:
        batch_number, micro = divmod(number, self.accumulate)
        epoch, position = divmod(batch_number, self.per_epoch)
        rows = self._epoch_rows(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        parts, part = self.world_size * self.accumulate, self.rank * self.accumulate + micro
        slots = np.arange(len(rows) * part // parts, len(rows) * (part + 1) // parts)
        try:
            samples = [self.dataset.get(int(row), sample_rng(self.seed, epoch, int(row)) if self.augment else None) for row in rows[slots]]
        except DataError as error:
            return error  # raised in the consumer as it is, without the traceback of a worker wrapped round it
        return replace(collate(samples), slot=torch.from_numpy(slots), global_size=len(rows))


class _CountFrom(Sampler[int]):
    """start, start + 1, ... up to stop (None: for ever)."""

    def __init__(self, start: int, stop: int | None = None) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while self.stop is None or number < self.stop:
            yield number
            number += 1


def _one_thread(worker: int) -> None:
    """Workers are the parallelism; and threads of a forked parent must not be waited for."""
    torch.set_num_threads(1)


class Loader:
    """Infinite iterator of batches (see :func:`geossl.data.collate`) over epochs; made by :func:`build_loader`.

    Attributes:
        batches_per_epoch: Global batches in one pass over the data set: optimiser steps per epoch.
        position: Number of the next micro-batch that has not been handed out yet, counted over all epochs.
    """

    def __init__(self, batches: _Batches, workers: int, prefetch: int, context: str | None, pin_memory: bool) -> None:
        self._batches, self._workers, self._prefetch, self._context, self._pin = batches, workers, prefetch, context, pin_memory
        self.batches_per_epoch = batches.per_epoch
        self.position = 0
        self._stream: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next micro-batch, counted from 0."""
        return self.position // self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return self.batches_per_epoch * self._batches.accumulate

    def __iter__(self) -> Loader:
        """Return itself: the loader is one endless stream."""
        return self

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            DataError: a sample of the batch cannot be used; the message names its file. The position is not advanced.
        """
        if self._stream is None:
            self._stream = self._open(_CountFrom(self.position))
        batch = next(self._stream)
        if isinstance(batch, DataError):
            self.close()
            raise batch
        self.position += 1
        return batch

    def one_pass(self) -> Iterator[Any]:
        """Yield the batches of one epoch from its start (the current epoch), without moving the loader's position."""
        start = self.epoch * self._per_epoch
        for batch in self._open(_CountFrom(start, start + self._per_epoch)):
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch the consumer has not seen, and what it counts; prefetched batches do not matter."""
        batches = self._batches
        step, micro_batch = divmod(self.position, batches.accumulate)
        fixed = {"seed": batches.seed, "batch_size": batches.batch_size, "samples": len(batches.dataset)}
        return {"step": step, "micro_batch": micro_batch, **fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position. Workers, ranks and micro-batches may differ from those of the saved run.

        Raises:
            ConfigError: seed, batch size or data set size differ, so that the position means other samples.
        """
        own = self.state_dict()
        changed = [f"{key} {state[key]!r} -> {own[key]!r}" for key in ("seed", "batch_size", "samples") if state[key] != own[key]]
        if changed:
            raise ConfigError(f"the data position cannot be restored, this changed since it was saved: {', '.join(changed)}")
        self.close()
        self.position = int(state["step"]) * self._batches.accumulate + int(state["micro_batch"])

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        self._stream = None

    def _open(self, numbers: _CountFrom) -> Iterator[Any]:
        parallel = self._workers > 0
        return iter(
            DataLoader(
                self._batches,
                batch_size=None,
                sampler=numbers,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if parallel else None,
                multiprocessing_context=self._context if parallel else None,
                worker_init_fn=_one_thread,
                pin_memory=self._pin,
                generator=torch.Generator(),  # its own: opening a loader must not advance the global random state
            )
        )


def build_loader(
    dataset: SampleSource,
    batch_size: int,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    augment: bool = True,
    accumulate: int = 1,
    prefetch: int = 2,
    context: str | None = None,
    pin_memory: bool = False,
) -> Loader:
    """Make the infinite iterator of batches of ``dataset``.

    The order of an epoch depends on (seed, epoch), and every sample on (seed, epoch, row), on nothing else: the batches are the same for
    any number of workers, and the parts of all ranks and micro-batches together are the batch
    of one process.

    Args:
        dataset: The data set.
        batch_size: Clouds in the *global* batch, over all ranks and micro-batches of an optimiser step.
        seed: >= 0.
        rank: Number of this process.
        world_size: Number of processes.
        workers: Worker processes that make batches ahead; 0 makes them in this process.
        shuffle: Visit the rows in a new random order each epoch (``dataset.order``); else in their own order.
        drop_last: Leave the incomplete batch at the end of an epoch out.
        augment: Random subset and augmentation; else the deterministic evaluation form.
        accumulate: Micro-batches each rank's part is handed out in, one after the other.
        prefetch: Batches each worker makes ahead.
        context: Start method of the workers, ``fork``, ``spawn`` or ``forkserver``; None is the system's own.
        pin_memory: Copy batches to page-locked memory, for a quicker transfer to a GPU.

    Raises:
        ConfigError: an argument is out of range, the batch does not divide by the ranks or is larger than the data set.

    Example:
        >>> loader = build_loader(DATASETS.config("objects").build("train"), 32, seed=0)
        >>> batch = next(loader)
    """
    require(batch_size >= 1, "batch_size", "must be at least 1", batch_size)
    require(seed >= 0, "seed", "must not be negative", seed)
    require(workers >= 0, "workers", "must not be negative", workers)
    require(0 <= rank < world_size, "rank", f"must lie in 0..{world_size - 1}", rank)
    require(accumulate >= 1, "accumulate", "must be at least 1", accumulate)
    parts = world_size * accumulate
    require(batch_size % parts == 0, "batch_size", f"must divide by {world_size} processes x {accumulate} micro-batches", batch_size)
    require(drop_last or parts == 1, "drop_last", f"must be True with {world_size} processes x {accumulate} micro-batches", drop_last)
    batches = _Batches(dataset, batch_size, seed, rank, world_size, accumulate, shuffle, drop_last, augment)
    require(batches.per_epoch > 0, "batch_size", f"must not be more than the data set's {len(dataset)} samples", batch_size)
    return Loader(batches, workers, prefetch, context, pin_memory)
