"""Rotary position encoding in two dimensions: its definition, its bits on every backend, and that no view is ever written through."""

from __future__ import annotations

import math

import pytest
import torch
from golden_files import GoldenFile, close, golden_files
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geossl import ops

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDTHS = (4, 12, 16, 32, 36, 48, 64, 128, 136, 520)  # a pair of 128 and more channels is far apart
GOLDEN = golden_files("croco", lambda metadata, names: "rope/tokens" in names)


def grid(height: int, width: int) -> Tensor:
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).view(-1, 2)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN with NaN and -0 with -0 alone."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def test_definition(backend):
    """Pair k of each half turns by position / base ** (k / (D / 4)): rows in the first half, columns in the second."""
    positions, dim, base, scale = torch.tensor([[2, 5], [-3, 0], [0, 40]]), 12, 50.0, 0.7
    x = torch.randn(6, 2, dim, dtype=torch.float64)
    got = ops.rope_2d(x, ops.rope_2d_table(positions, dim, base, scale, torch.float64))
    quarter = dim // 4
    for t in range(6):
        for h in range(2):
            for axis in range(2):
                for k in range(quarter):
                    angle = float(positions[t % 3, axis]) * scale / base ** (k / quarter)
                    first = axis * 2 * quarter + k
                    turned = complex(x[t, h, first], x[t, h, first + quarter]) * complex(math.cos(angle), math.sin(angle))
                    assert got[t, h, first].item() == pytest.approx(turned.real, abs=1e-12)
                    assert got[t, h, first + quarter].item() == pytest.approx(turned.imag, abs=1e-12)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_numbers(backend, path):
    golden = GoldenFile(path).part("rope/")
    batch, heads, count, dim = golden["tokens"].shape
    table = ops.rope_2d_table(golden["positions"].view(-1, 2), dim, *golden["freq_F0"].tolist())
    tokens = golden["tokens"].requires_grad_()
    out = ops.rope_2d(tokens.transpose(1, 2).reshape(batch * count, heads, dim), table).view(batch, count, heads, dim).transpose(1, 2)
    close(out.detach(), golden["out"], rtol=0, atol=1e-6)
    close(torch.autograd.grad(out, tokens, golden["grad_out"])[0], golden["grad_tokens"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", WIDTHS)
def test_backends_and_threads_agree_to_the_bit(on_backend, dim, dtype):
    table = ops.rope_2d_table(grid(2, 3), dim, dtype=wide(dtype))
    qkv = torch.randn(18, 3, 5, dim).to(dtype)
    grad = torch.randn(18, 5, dim).to(dtype)
    results = {}
    for name, seed, threads in (("twin", 0, 1), ("cpu", 0, 1), ("cpu", 0, 2), ("cuda", 0, 1), ("cuda", 1, 1), ("cuda", 5, 1)):
        torch.set_num_threads(threads)
        try:
            with on_backend(name, seed):
                x = qkv.clone().requires_grad_()
                out = ops.rope_2d(x[:, 1], table)
                results[name, seed, threads] = out.detach(), *torch.autograd.grad(out, x, grad)
        finally:
            torch.set_num_threads(1)
    for got in results.values():
        assert all(same_bits(a, b) for a, b in zip(got, results["twin", 0, 1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_read_and_rounded_as_torch_does(backend, dtype):
    """All 65,536 numbers, times factors that leave their range on both sides and that fall between two of them."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    factors = torch.tensor([1, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-14, 3e-8, 60000.0, 1e-38, 1e38, -0.3])
    x = torch.zeros(len(factors), 2**15, 4, dtype=dtype)
    x[:, :, 0], x[:, :, 2] = numbers.view(2, -1)
    table = torch.zeros(len(factors), 2, 2)
    table[:, 0] = factors[:, None]
    got = ops.rope_2d(x, table)
    want = (x.float() * factors[:, None, None]).to(dtype)
    assert same_bits(got[..., ::2], want[..., ::2])


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(*[st.integers(-30, 30)] * 6), st.integers(1, 20), st.floats(1.5, 1e4), st.floats(-2, 2), st.integers(0, 2**31 - 1)
)  # fmt: skip
def test_norms_are_kept_and_products_depend_on_differences_alone(places, quarter, base, scale, seed):
    dim, generator = 4 * quarter, torch.Generator().manual_seed(seed)
    query, key, shift = torch.tensor(places).view(3, 2)
    table = ops.rope_2d_table(torch.stack([query, key, query + shift, key + shift]), dim, base, scale, torch.float64)
    q, k = torch.randn(2, 1, 3, dim, dtype=torch.float64, generator=generator)
    rotated = ops.rope_2d(torch.cat([q, k, q, k]), table)
    torch.testing.assert_close(rotated.norm(dim=-1), torch.cat([q, k, q, k]).norm(dim=-1))
    torch.testing.assert_close((rotated[0] * rotated[1]).sum(-1), (rotated[2] * rotated[3]).sum(-1), rtol=1e-9, atol=1e-9)


def layouts() -> dict[str, Tensor]:
    """Tensors ``[6, 2, 8]`` of every layout, all with the same numbers in them."""
    values = torch.arange(96.0).view(6, 2, 8)
    joint = torch.zeros(6, 3, 2, 8)
    joint[:, 1] = values
    wider = torch.zeros(6, 2, 11)
    wider[..., 3:] = values
    return {
        "contiguous": values.clone(),
        "inside a joint qkv": joint[:, 1],
        "heads first": values.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": values.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every second channel": values.repeat_interleave(2, 2)[..., ::2],
        "rows apart": wider[..., 3:],
        "rows backwards in memory": values.flip(0).contiguous().flip(0),
    }


@pytest.mark.parametrize("name", layouts())
def test_any_layout_is_read_and_none_is_written(backend, name):
    x, table = layouts()[name], ops.rope_2d_table(grid(1, 3), 8)
    everything = x._base if x._base is not None else x
    before, want = everything.clone(), ops.rope_2d(layouts()["contiguous"], table)
    got = ops.rope_2d(x, table)
    assert torch.equal(got, want)
    assert got.is_contiguous()
    assert got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(everything, before)


def test_repeated_rows_and_a_strided_table(backend):
    x, table = torch.randn(1, 2, 8).expand(6, 2, 8), ops.rope_2d_table(grid(2, 3), 8)
    want = ops.rope_2d(x.contiguous(), table)
    assert torch.equal(ops.rope_2d(x, table), want)
    assert torch.equal(ops.rope_2d(x, table.transpose(0, 2).contiguous().transpose(0, 2)), want)
    leaf = torch.randn(6, 2, 8, requires_grad=True)
    ops.rope_2d(leaf, table).sum().backward()  # the gradient of a sum is one number, expanded
    assert torch.equal(leaf.grad, torch.autograd.grad(ops.rope_2d(leaf, table), leaf, torch.ones(6, 2, 8))[0])


def test_queries_and_keys_in_one_call_and_images_by_one_table(backend):
    table, qkv = ops.rope_2d_table(grid(2, 2), 16), torch.randn(8, 3, 3, 16)
    joint = ops.rope_2d(qkv[:, :2].flatten(1, 2), table).view(8, 2, 3, 16)
    assert torch.equal(joint[:, 0], ops.rope_2d(qkv[:, 0], table))
    assert torch.equal(joint[:, 1], ops.rope_2d(qkv[:, 1], torch.cat([table, table])))


@pytest.mark.parametrize("shape", [(0, 2, 8), (6, 0, 8), (0, 0, 4)])
def test_empty(backend, shape):
    x = torch.zeros(shape, requires_grad=True)
    for count in (3, 0) if shape[0] == 0 else (3,):
        out = ops.rope_2d(x, torch.zeros(count, 2, shape[2] // 2))
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape
    assert ops.rope_2d_table(torch.zeros(0, 2, dtype=torch.int64), 8).shape == (0, 2, 4)


def test_infinities_and_nan_stay_in_their_pair(backend):
    x, table = torch.randn(3, 2, 16), ops.rope_2d_table(grid(1, 3) + 1, 16)
    want = ops.rope_2d(x, table)
    x[1, 0, 2], x[2, 1, 9] = torch.nan, torch.inf
    got = ops.rope_2d(x, table)
    touched = torch.zeros(3, 2, 16, dtype=torch.bool)
    touched[1, 0, [2, 6]] = touched[2, 1, [9, 13]] = True
    assert not got[touched].isfinite().any()
    assert torch.equal(got[~touched], want[~touched])


def test_derivatives(backend):
    table = ops.rope_2d_table(grid(1, 2), 8, dtype=torch.float64)
    x = torch.randn(4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: ops.rope_2d(x[:, 1], table), x)
    torch.autograd.gradgradcheck(lambda x: ops.rope_2d(x[:, 1], table).sin(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype):
    x, table = torch.randn(6, 2, 8).to(dtype), ops.rope_2d_table(grid(2, 3), 8)
    want = ops.rope_2d(x, table)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.rope_2d(x, ops.rope_2d_table(grid(2, 3), 8))
    assert same_bits(got, want)


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_whole_graph_for_any_size(engine):
    torch._dynamo.reset()

    def run(qkv: Tensor, positions: Tensor) -> Tensor:
        table = ops.rope_2d_table(positions, qkv.shape[-1])
        return (ops.rope_2d(qkv[:, 0], table) * ops.rope_2d(qkv[:, 1], table)).sum(-1)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=engine)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count, images, heads in ((6, 2, 5), (12, 3, 7), (20, 4, 2)):
            qkv, positions = torch.randn(count * images, 3, heads, 16), grid(2, count // 2).clone()
            results = []
            for function in (run, compiled):
                leaf = qkv.clone().requires_grad_()
                out = function(leaf, positions)
                results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), leaf)))
            torch.testing.assert_close(results[1], results[0])


def test_bad_input_is_explained(backend):
    table, x = ops.rope_2d_table(grid(1, 3), 8), torch.zeros(6, 2, 8)
    with pytest.raises(ValueError, match="7 tokens of x must be a multiple of the 3 positions"):
        ops.rope_2d(torch.zeros(7, 2, 8), table)
    with pytest.raises(ValueError, match="6 tokens of x must be a multiple of the 0 positions"):
        ops.rope_2d(x, table[:0])
    with pytest.raises(ValueError, match=r"multiple of 4 .*got D = 6"):
        ops.rope_2d(torch.zeros(6, 2, 6), table)
    with pytest.raises(ValueError, match=r"\[T, H, D\].*flatten the batch"):
        ops.rope_2d(x[None], table)
    with pytest.raises(ValueError, match=r"\[N, 2, 4\] for x \[6, 2, 8\]"):
        ops.rope_2d(x, ops.rope_2d_table(grid(1, 3), 16))
    with pytest.raises(TypeError, match=r"table must be torch.float32 for x of torch.bfloat16"):
        ops.rope_2d(x.bfloat16(), table.bfloat16())
    with pytest.raises(TypeError, match=r"table must be torch.float64 for x of torch.float64"):
        ops.rope_2d(x.double(), table)
    with pytest.raises(TypeError, match="x must be a float32"):
        ops.rope_2d(x.int(), table)
    with pytest.raises(ValueError, match="would get no gradient"):
        ops.rope_2d(x, table.clone().requires_grad_())
    with pytest.raises(ValueError, match="table is on meta"):
        ops.rope_2d(x, table.to("meta"))


def test_bad_positions_are_explained():
    with pytest.raises(TypeError, match="int64 or int32"):
        ops.rope_2d_table(torch.zeros(3, 2), 8)
    with pytest.raises(ValueError, match=r"must be \[N, 2\]"):
        ops.rope_2d_table(grid(1, 3)[None], 8)
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        ops.rope_2d_table(grid(1, 3), 6)
    with pytest.raises(ValueError, match="base must be a finite number above 0, got -1"):
        ops.rope_2d_table(grid(1, 3), 8, base=-1.0)
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        ops.rope_2d_table(grid(1, 3), 8, scale=math.nan)
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32"):
        ops.rope_2d_table(grid(1, 3), 8, dtype=torch.bfloat16)
