"""Two processes with half a batch each compute what one process with the whole batch computes: losses, gradients, statistics."""

from __future__ import annotations

import dataclasses
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import geossl
from geossl.geometry import PackedPoints, PointBatch
from geossl.layers import BatchNorm, PackedTokenEmbedding
from geossl.methods import METHODS
from geossl.models import TeacherConfig
from geossl.ops import offsets_from_lengths


def model_and_clouds():
    torch.manual_seed(0)
    backbone = geossl.create_backbone("point_vit_tiny", dim=16, depth=2, heads=2, groups=8, group_size=4, drop_path=0.2).double()
    method = dataclasses.replace(METHODS.config("point_mae"), decoder_depth=1, decoder_heads=2).build(backbone).double().train()
    return method, torch.randn(4, 40, 3, dtype=torch.float64), BatchNorm(6).double().train(), torch.randn(10, 6, dtype=torch.float64)


def one_step(method, points, norm, rows, slot, weight):
    batch = PointBatch(PackedPoints.from_padded(points), slot=slot, global_size=4)
    loss = method(batch, generator=torch.Generator().manual_seed(3)).loss
    out = norm(rows)
    (loss + (out * weight).sum()).backward()
    gradients = [p.grad for p in (*method.parameters(), *norm.parameters())]
    buffers = [b.double() for b in (*method.buffers(), *norm.buffers())]
    return loss.detach(), gradients, buffers, out.detach()


def embed_groups(part: slice, without: int = 0):
    """One step of a packed embedding on some of six groups: tokens, gradients, statistics."""
    torch.manual_seed(1)
    embed = PackedTokenEmbedding(5, 4, widths=(6, 8, 7), slots=4, empty_slots=True, slot_embedding=True).double().train()
    groups = torch.randn(13, 4, dtype=torch.float64).split([4, 1, 2, 3, 1, 2])[part]
    keep = torch.tensor([i for i in range(1, len(groups)) if i != without])
    tokens = embed(torch.cat(groups), offsets_from_lengths(torch.tensor([len(group) for group in groups])), keep)
    tokens.square().sum().backward()
    return tokens.detach(), [p.grad for p in embed.parameters()], [b.double() for b in embed.buffers()]


def scales_step(name: str, slot: torch.Tensor | None):
    """One step of a hierarchical method on some of four clouds, whose tokens are visible in different numbers."""
    torch.manual_seed(0)
    scales = {"dims": (8, 12, 24), "depths": (1, 1, 1), "heads": 2, "groups": (24, 16, 8), "group_sizes": (6, 4, 4), "drop_path": 0.2}
    backbone = geossl.create_backbone("point_m2ae_tiny", **scales, embed_widths=(8, 16, 16))
    options = {"teacher": TeacherConfig(name="random"), "saliency_temperature": 1.0} if name == "i2p_mae" else {}
    method = dataclasses.replace(METHODS.config(name), decoder_heads=2, **options).build(backbone).double().train()
    points = torch.randn(4, 60, 3, dtype=torch.float64)
    batch = PointBatch(PackedPoints.from_padded(points if slot is None else points[slot]), slot=slot, global_size=4)
    output = method(batch, generator=torch.Generator().manual_seed(5))
    output.loss.backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    return output.loss.detach(), gradients, int(output.aux["hidden"][1].sum())


def run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    method, points, norm, rows = model_and_clouds()
    slot, weight = torch.arange(rank, 4, 2), torch.arange(60.0, dtype=torch.float64).view(10, 6)
    part = slice(0, 3) if rank == 0 else slice(3, 10)  # uneven halves for the plain batch norm
    torch.save(one_step(method, points[slot], norm, rows[part], slot, weight[part]), f"{folder}/{rank}.pt")
    for name in ("point_m2ae", "i2p_mae"):
        torch.save(scales_step(name, slot), f"{folder}/{name}{rank}.pt")
    torch.save(embed_groups(slice(0, 4) if rank == 0 else slice(4, 6)), f"{folder}/embed{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, args=(port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    method, points, norm, rows = model_and_clouds()
    loss, gradients, buffers, out = one_step(method, points, norm, rows, None, torch.arange(60.0, dtype=torch.float64).view(10, 6))

    exact = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss, **exact)
    torch.testing.assert_close(torch.cat([parts[0][3], parts[1][3]]), out, **exact)
    methods = len(list(method.parameters()))
    for i, expected in enumerate(gradients):
        total = parts[0][1][i] + parts[1][1][i]
        # The method's loss is a mean over the batch, so data-parallel training averages; the batch norm's here is a sum.
        torch.testing.assert_close(total / 2 if i < methods else total, expected, **exact)
    for part in parts:
        for mine, expected in zip(part[2], buffers, strict=True):
            torch.testing.assert_close(mine, expected, **exact)

    # Groups 0 and 4, the first of each process, are not kept.
    embeds = [torch.load(tmp_path / f"embed{rank}.pt", weights_only=True) for rank in range(2)]
    tokens, gradients, buffers = embed_groups(slice(0, 6), without=4)
    torch.testing.assert_close(torch.cat([part[0] for part in embeds]), tokens, **exact)
    for i, expected in enumerate(gradients):
        torch.testing.assert_close(embeds[0][1][i] + embeds[1][1][i], expected, **exact)
    for part in embeds:
        for mine, expected in zip(part[2], buffers, strict=True):
            torch.testing.assert_close(mine, expected, **exact)

    for name in ("point_m2ae", "i2p_mae"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
        loss, gradients, hidden = scales_step(name, None)
        assert first[2] + second[2] == hidden
        assert first[2] != second[2]
        torch.testing.assert_close((first[0] + second[0]) / 2, loss, **exact)
        for one, other, expected in zip(first[1], second[1], gradients, strict=True):
            torch.testing.assert_close((one + other) / 2, expected, **exact)
