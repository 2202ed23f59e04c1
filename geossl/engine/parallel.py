"""One module over several processes: DDP (every process holds all weights) or FSDP2 (each holds a part), behind the same calls."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from geossl.engine.distributed import World


class _LossAndMetrics(nn.Module):
    """Calls a module and returns plain tensors: DDP and FSDP find those, but do not look into the objects of others."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.module(batch, generator=generator)
        return output.loss, output.metrics


class Parallel:
    """Runs ``module`` as the configuration says and gathers or spreads its state.

    States are always those of the bare module, whole, whatever the number of processes: a checkpoint written by two FSDP processes is
    continued by one process, or by DDP.

    Args:
        module: On ``world.device``. FSDP changes its parameters in place: make optimiser and EMA afterwards.
        kind: ``ddp`` or ``fsdp``.
        world: The processes.

    Attributes:
        module: The bare module.
        forward: What to call in a training step: batch and generator to loss and metrics.
    """

    def __init__(self, module: nn.Module, kind: str, world: World) -> None:
        self.module, self.world = module, world
        self.sharded = kind == "fsdp"
        self.forward: nn.Module = _LossAndMetrics(module)
        self._whole: nn.Module | None = None
        if self.sharded:
            self._whole = copy.deepcopy(module).cpu() if world.is_main else None
            _shard(self.forward, world)
        elif world.size > 1:
            # Batch statistics are all-reduced inside the layers, so buffers stay equal without being sent. torch renamed the switch.
            known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
            switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.forward = nn.parallel.DistributedDataParallel(self.forward, **{switch: False})  # type: ignore[arg-type]

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Exchange gradients in the backward pass of the ``last`` micro-batch of a step only."""
        if self.sharded:
            self.forward.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
        elif isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def whole_module(self) -> Iterator[nn.Module | None]:
        """The whole module in evaluation mode on the main process, None on the others."""
        state = self.model_state() if self.sharded else {}  # all processes take part
        module = self._whole if self.sharded else self.module
        if not self.world.is_main or module is None:
            yield None
            return
        if self.sharded:
            module.load_state_dict(state)
            module.to(self.world.device)
        module.eval()
        try:
            yield module
        finally:
            module.train()
            if self.sharded:
                module.cpu()

    def model_state(self) -> dict[str, Tensor]:
        """Whole state of the module on the CPU; empty on all but the main process when sharded."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        return dict(get_model_state_dict(self.module, options=_options(cpu_offload=True)))  # type: ignore[arg-type]

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Load a whole state, given on every process."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self.module, dict(state), options=_options())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole state of the optimiser by parameter name, on the CPU; empty on all but the main process when sharded."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return get_optimizer_state_dict(self.module, optimizer, options=_options(cpu_offload=True))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load a whole state of the optimiser, given on every process."""
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self.module, optimizer, state, options=_options())


def _shard(module: nn.Module, world: World) -> None:
    """Apply FSDP2: every block (entry of a ``ModuleList``) is gathered and freed by itself, the rest with the module."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for part in reversed(list(module.modules())):  # lists within lists first: a parameter belongs to the innermost entry
        if isinstance(part, nn.ModuleList):
            for block in part:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _options(cpu_offload: bool = False) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
