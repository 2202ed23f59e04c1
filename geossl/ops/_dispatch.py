"""Registers operators with torch and chooses what runs them: the native kernel of the tensor's device, or the plain-torch twin.

An operator is defined once, by its schema and three functions:

* ``native(kind, *args)`` allocates the outputs and calls the C function of the library ``kind`` ("cpu" or "cuda"). The same code serves
  both, so that tests which run the CUDA kernels on CPU tensors (:func:`backend`) test the wrapper that serves the GPU;
* ``twin(*args)`` computes the same in plain torch (:mod:`geossl.ops.reference`): the oracle of the tests, and what runs without library;
* ``fake(*args)`` returns empty outputs of the right shape, for ``torch.compile`` and the meta device.

Value checks (offsets ascending, lengths in range...) belong into ``native`` and ``twin`` through :mod:`geossl.ops._checks`: they run when
the operator runs, before its kernel, and are not traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from geossl.ops import _native

Backend = Literal["cpu", "cuda", "twin"]
Operator = Callable[..., Any]

LIBRARY = torch.library.Library("geossl", "DEF")

_forced: Backend | None = None


def define(
    schema: str,
    *,
    native: Callable[..., Any],
    twin: Callable[..., Any],
    fake: Callable[..., Any],
    autocast: torch.dtype | None = torch.float32,
    direct: bool = False,
) -> Operator:
    """Register the operator ``geossl::<schema>`` and return a function that calls it.

    Args:
        schema: Name, arguments and results as torch writes them.
        native: Wrapper of the C functions; takes the library's kind and the operator's arguments.
        twin: The same in plain torch.
        fake: The same without data.
        autocast: Type to which autocast converts floating inputs; None leaves them as they are.
        direct: The operator has no autograd rule, and its callers have done what autocast would do. Calls on plain CPU tensors then
            skip torch's dispatcher, which takes 4 to 10 us, unless something listens to it.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)

    def on_cpu(*args: Any) -> Any:
        if _forced is None:
            return native("cpu", *args) if _native.available("cpu") else twin(*args)
        return twin(*args) if _forced == "twin" else native(_forced, *args)

    def on_cuda(*args: Any) -> Any:
        return native("cuda", *args) if _forced != "twin" and _native.available("cuda") else twin(*args)

    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"geossl::{name}", fake, lib=LIBRARY)
    if autocast is not None:
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"geossl::{name}", device, autocast, lib=LIBRARY)
    registered = getattr(torch.ops.geossl, name).default

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if direct and _forced is None and not is_compiling():
            first = args[0]
            if first.__class__ is Tensor and first.is_cpu and not _listening() and _native.available("cpu"):
                return native("cpu", *args)
        return registered(*args)

    return call


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Raise for forward-mode derivatives, of which torch would return none in silence."""
    for value in args:
        if isinstance(value, Tensor) and value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"geossl::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual_level): use reverse mode (torch.func.vjp, "
                "jacrev, backward), or detach its inputs"
            )


def _listening() -> bool:
    """Return whether tracing (jit, fake tensors, make_fx), a functional transform (vmap, grad) or a profiler must see every call."""
    return (
        _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None or peek_interpreter_stack() is not None or _profiler_enabled()
    )


@contextmanager
def backend(name: Backend | None) -> Iterator[None]:
    """Run operators on CPU tensors by "cpu" kernels, "cuda" kernels (built for the host, see ``tests/cuda_on_host``) or the "twin".

    For tests and benchmarks; None chooses as always. Not thread-safe.
    """
    global _forced
    saved, _forced = _forced, name
    try:
        yield
    finally:
        _forced = saved


def place(kind: _native.Kind, tensor: Tensor) -> tuple[int, ...]:
    """Return the leading arguments of a C function: the number of threads on the CPU; device and stream on CUDA."""
    return (torch.get_num_threads(),) if kind == "cpu" else (_native.device_index(tensor), _native.stream(tensor))


def functions(name: str, *argtypes: str) -> dict[str, _native.NativeFunction]:
    """Declare ``geossl_<name>_cpu`` and ``geossl_<name>_cuda``, which take the same arguments after those of :func:`place`."""
    return {
        "cpu": _native.function("cpu", f"geossl_{name}_cpu", _native.INT, *argtypes),
        "cuda": _native.function("cuda", f"geossl_{name}_cuda", _native.INT, _native.PTR, *argtypes),
    }


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def inverse(index: Tensor, batch: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sort the entries of ``index`` by the row they name, for sums over equal indices in a fixed order on a GPU.

    Args:
        index: ``[batch * E]`` or any shape of that many entries, local to its cloud of ``rows`` rows; -1 names no row.
        batch: Clouds.
        rows: Rows of each cloud.

    Returns:
        Entry numbers sorted by (cloud, row, entry), and where each row's entries begin, ``[batch * rows + 1]``.
    """
    total = batch * rows
    local = index.reshape(batch, -1)
    flat = local + torch.arange(0, max(total, 1), max(rows, 1), device=index.device)[:batch, None]
    ordered, order = torch.sort(torch.where((local >= 0) & (local < rows), flat, total).flatten(), stable=True)
    return order, torch.searchsorted(ordered, torch.arange(total + 1, device=index.device))
