"""How one row is measured: CPU and wall time of a call and of its peers in turn, peak memory, and the floor below which it cannot go.

The floor is the larger of two times: the counted floating point operations at the rate of the machine's own matrix product, and the bytes
that must at least be moved at the rate of its own copy. Both rates are measured in the same process, per CPU second and data type.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import geossl
from geossl.cli.benchmark.row import Peer, Row
from geossl.ops import native_info

GEMM_SHAPES = ((512, 1536, 384), (512, 384, 1536), (2048, 256, 128), (2048, 512, 256))
"""Rows, columns and inner size of the matrix products timed for the floor: those of a transformer's MLP and of the token embedding."""

SAMPLE_SECONDS = 0.02  # quick calls are repeated within one sample until it lasts this long
SLOW_SECONDS = 2.0  # slower calls are sampled SLOW_REPEATS times at most, unless the case says otherwise
SLOW_REPEATS = 3
LOST, LOST_SECONDS = 20, 0.1  # a peer so many times slower than ours, and slower than that, is timed once
SETTLE_SECONDS = 0.5
FEW_FAULTS, QUIET_ROUNDS = 64, 4  # pages in one round of all calls, and how many such rounds

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Sample(NamedTuple):
    """One measurement of a call."""

    cpu: float  # seconds of process CPU time
    wall: float  # seconds
    peak: float | None  # MiB, highest resident memory meanwhile
    rise: float | None  # MiB, peak over the resident memory before
    caller: float | None = None  # seconds of CPU time of the calling thread


def clock(run: Callable[[], Any], calls: int) -> Sample:
    """Time ``calls`` calls of ``run``; times are per call."""
    before = reset_peak_memory()
    wall, cpu, caller = time.perf_counter(), time.process_time(), time.thread_time()
    for _ in range(calls):
        run()
    cpu, wall, caller = time.process_time() - cpu, time.perf_counter() - wall, time.thread_time() - caller
    peak = peak_memory()
    rise = None if peak is None or before is None else round(max(peak - before, 0.0), 1)
    return Sample(cpu / calls, wall / calls, peak, rise, caller / calls)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure, with its peers.

    Args:
        inputs: What it is given, in words.
        run: The call; what it returns is the answer the peers' answers are compared with.
        moved: Bytes that must at least be read and written.
        moved_is: What ``moved`` counts.
        flop: Floating point operations; None counts those of the matrix products of one run.
        flop_is: What ``flop`` counts.
        dtype: Type of the matrix products (and of what is moved).
        peers: Other ways to the same answer.
        differs: ``differs(answer, answer of a peer)`` says in words how they differ, "" when they agree.
        target: Seconds of CPU time to stay below, or None.
        share_of: CPU seconds of the step this is a part of, or None.
        clock: How ``run`` is timed; a case that runs elsewhere brings its own.
        warm: Call everything some more before timing (:func:`settle`).
        slow: Seconds of CPU time above which a call is sampled three times at most.
        cloud: Kind of cloud it is given, "" where there is only one; the name of such a row ends in it.
    """

    inputs: str
    run: Callable[[], Any]
    moved: int
    moved_is: str
    flop: int | None = None
    flop_is: str = "matrix products of one run"
    dtype: torch.dtype = torch.float32
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    differs: Callable[[Any, Any], str] = lambda ours, theirs: ""
    target: float | None = None
    share_of: float | None = None
    clock: Callable[[Callable[[], Any], int], Sample] = clock
    warm: bool = True
    slow: float = SLOW_SECONDS
    cloud: str = ""


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient a backward pass left."""
    if leaf.grad is None:
        raise RuntimeError("the backward pass left no gradient")
    return leaf.grad


def values_differ(ours: list[Tensor], theirs: list[Tensor]) -> str:
    """Compare a result and the gradients after it by their norms."""
    for a, b, what in zip(ours, theirs, ("result", "gradient", "second gradient"), strict=False):
        error = float((a - b).norm() / a.norm().clamp(min=1e-30))
        if not error < 1e-4:
            return f"{what} differs by {error:.2g} of its norm"
    return ""


def measure(suite: str, name: str, case: Case, repeats: int, seconds: float = SAMPLE_SECONDS) -> Row:
    """Compare the answers, then time the case and its peers in turn: ``repeats`` samples of at least ``seconds`` each."""
    peers = {title: Peer(name=title) for title in case.peers}
    runs: dict[str, Callable[[], Any]] = {"": case.run}
    answer = case.run()
    for title, run in case.peers.items():
        try:
            peers[title].differs = case.differs(answer, run())
        except Exception as error:  # another package's fault is a finding about that package; the row says so
            peers[title].differs = f"failed: {type(error).__name__}: {error}"
        else:
            runs[title] = run
    flop = case.flop if case.flop is not None else count_flop(case.run)
    del answer
    first = {}  # for the memory, and to see how long a call takes
    release_memory()
    for title, run in runs.items():
        trim_memory()
        first[title] = case.clock(run, 1)
    lost = [title for title, sample in first.items() if sample.cpu > max(LOST_SECONDS, LOST * first[""].cpu)]
    samples: dict[str, list[Sample]] = {title: [first[title]] if title in lost else [] for title in runs}
    for title in lost:
        del runs[title]
    if case.warm:
        settle(list(runs.values()))
    calls = {title: max(1, round(seconds / max(sample.cpu, 1e-7))) for title, sample in first.items()}
    for turn in range(repeats):
        for title, run in runs.items():
            if turn < SLOW_REPEATS or first[title].cpu < case.slow:
                samples[title].append(case.clock(run, calls[title]))

    ours = samples.pop("")
    cpu = median(sample.cpu for sample in ours)
    for title, theirs in samples.items():
        cpu_of_peer = median(sample.cpu for sample in theirs)
        peers[title] = Peer(
            name=title,
            differs=peers[title].differs,
            cpu_s=cpu_of_peer,
            wall_s=median(sample.wall for sample in theirs),
            peak_mib=first[title].peak,
            ratio=cpu_of_peer / cpu,
            repeats=len(theirs),
        )
    return Row.of(
        suite=suite,
        name=name,
        inputs=case.inputs,
        threads=torch.get_num_threads(),
        dtype=str(case.dtype).removeprefix("torch."),
        cpu_s=cpu,
        wall_s=median(sample.wall for sample in ours),
        caller_s=None if ours[0].caller is None else median(sample.caller or 0.0 for sample in ours),
        repeats=len(ours),
        calls_per_repeat=calls[""],
        peak_mib=first[""].peak,
        rise_mib=first[""].rise,
        flop=flop,
        flop_is=case.flop_is,
        gemm_flops=gemm_rate(case.dtype),
        bytes=case.moved,
        bytes_is=case.moved_is,
        copy_bytes_per_s=copy_rate(case.dtype, case.moved),
        peers=list(peers.values()),
        target_s=case.target,
        step_cpu_s=case.share_of,
        load_average=round(os.getloadavg()[0], 2),
        machine=machine(),
        cloud=case.cloud,
    )


# Memory --------------------------------------------------------------------------------------------------------------------------------


def release_memory() -> None:
    """Give what is no longer used back to the system; glibc keeps freed memory resident, where it would hide what a call needs."""
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """Give freed memory back to the system without looking for cycles, which takes a quarter of a second where all peers are loaded."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory() -> None:
    """Make glibc keep freed memory for the rest of the process instead of giving it back and asking for it again.

    Left alone it does either, by what was allocated before; 16 MiB of new pages then cost a call many times what it computes, or
    nothing, and ours and a peer's may fall on different sides.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def settle(runs: Sequence[Callable[[], Any]]) -> None:
    """Call all of ``runs`` in turn until they ask the system for no new pages, several rounds in a row: for half a second at most.

    One quiet round can be luck, a block left over from before. Memory was released to measure it, and aligned blocks take several calls to
    merge into ones that can be used again.
    """
    end, quiet = time.process_time() + SETTLE_SECONDS, 0
    while quiet < QUIET_ROUNDS:
        before = page_faults()
        for run in runs:
            run()
        quiet = quiet + 1 if page_faults() - before < FEW_FAULTS else 0
        if time.process_time() > end:
            return


def page_faults() -> int:
    """Pages the system has handed to this process so far; 0 where it does not tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def reset_peak_memory() -> float | None:
    """Start a new high-water mark of resident memory and return the memory resident now, in MiB; None where Linux does not run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or a container that forbids it
        return None
    return _status_mib("VmRSS")


def peak_memory() -> float | None:
    """Return the high-water mark of resident memory since :func:`reset_peak_memory`, in MiB."""
    return _status_mib("VmHWM")


def _status_mib(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(f"{key}:")), None)


# Floor ---------------------------------------------------------------------------------------------------------------------------------


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the values of ``tensors``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_flop(run: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products in one run, backward passes and custom autograd functions included.

    torch's counter leaves out the forms below; they are counted here as their siblings are.
    """
    aten = torch.ops.aten
    forms = {
        aten.addmm_: _product_flop,
        aten.addbmm_: _batched_flop,
        aten.baddbmm_: _batched_flop,
        aten.mv: lambda a, b, *_, **__: 2 * a.numel(),
        aten.addmv: lambda c, a, b, *_, **__: 2 * a.numel(),
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    }
    for formula in forms.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # the counter's own mark for formulas that take tensors, not shapes
    with FlopCounterMode(display=False, custom_mapping=forms) as counter:
        run()
    return int(counter.get_total_flops())


def _product_flop(total: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _batched_flop(total: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _attention_flop(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * query.numel() * key.shape[2] + 2 * query.numel() // query.shape[3] * value.shape[2] * value.shape[3]


def _attention_backward_flop(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    # scores again, the gradients of value and of the weights, and those of query and key
    per_pair = 6 * query.shape[3] + 4 * value.shape[3]
    return query.numel() // query.shape[3] * key.shape[2] * per_pair


def _rate(run: Callable[[], Any], work: float) -> float:
    """Work per CPU second, the median of five samples."""
    run()
    calls = max(1, round(SAMPLE_SECONDS / 4 / max(clock(run, 1).cpu, 1e-7)))
    return work / median(clock(run, calls).cpu for _ in range(5))


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """Floating point operations per CPU second of torch's matrix product: the best of :data:`GEMM_SHAPES`."""
    rates = []
    for rows, columns, inner in GEMM_SHAPES:
        a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        rates.append(_rate(functools.partial(torch.mm, a, b, out=out), 2.0 * rows * columns * inner))
    return max(rates)


def copy_rate(dtype: torch.dtype, moved: int) -> float:
    """Bytes read and written per CPU second by a copy, elsewhere or onto itself, whichever is quicker.

    It moves about ``moved`` bytes (at most 128 MiB): small ones stay in the cache, as those of the case do.
    """
    return _copy_rate(dtype, min(max(moved, 1 << 12), 1 << 27).bit_length())


@functools.cache
def _copy_rate(dtype: torch.dtype, bits: int) -> float:
    source = torch.zeros((1 << bits) // 4 // dtype.itemsize + 1, dtype=dtype)
    target = torch.ones_like(source)
    return max(_rate(lambda: target.copy_(source), 2.0 * nbytes(source)), _rate(lambda: target.add_(1), 2.0 * nbytes(source)))


# Machine -------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def machine() -> str:
    """Processor, versions, and what runs the operators."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    native = native_info()["cpu"]
    operators = f"native operators ({native['simd']}, compiler {native['compiler']})" if native["loaded"] else "operators as plain torch"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, geossl {geossl.__version__}"
    return f"{processor}, {os.cpu_count()} cores, {versions}, {operators}"
