"""Processes: who this one is, and the few things all of them must agree on."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geossl.errors import ConfigError

_TIMEOUT = timedelta(hours=2)  # the other processes wait while the first one probes, exports or writes a checkpoint


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Args:
        device: Where this process computes.
        rank: Its number.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that logs, probes and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return ``values`` added up over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool | Tensor) -> list[bool]:
        """For each flag, whether it is set in any process. Costs one small message and one wait for the device."""
        values = torch.stack([torch.as_tensor(flag, device=self.device).to(torch.float32) for flag in flags])
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def from_main(self, value: Any) -> Any:
        """Return the main process's ``value`` (a small picklable object) in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` (a small picklable object) of every process, in every process."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start_world(device: str = "auto", parallel: str = "ddp") -> World:
    """Find out who this process is; under ``torchrun``, join the others (NCCL between GPUs, gloo between CPUs).

    Args:
        device: ``auto`` (CUDA where there is a device), ``cpu`` or ``cuda``.
        parallel: ``fsdp`` needs a process group even for a single process started by torchrun.

    Raises:
        ConfigError: ``cuda`` was asked for and torch sees no device, or ``fsdp`` without torchrun.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no CUDA device; use --train.device cpu, and see `geossl doctor`")
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if parallel == "fsdp" and not under_torchrun:
        raise ConfigError("train.parallel is fsdp, which needs torchrun: torchrun --nproc-per-node 2 tools/pretrain.py CONFIG.yaml")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if under_torchrun else 0) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    if not under_torchrun:
        return World(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=_TIMEOUT)
    return World(place, dist.get_rank(), dist.get_world_size())


def stop_world() -> None:
    """Leave the process group, if one was joined. Call it once more when the module is no longer in use, before the program ends."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # A sharded module holds on to its groups in reference cycles. Left to the end of the interpreter, gloo's threads abort it.
    gc.collect()
