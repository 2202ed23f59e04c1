"""The benchmark: what its rows hold, that peers' answers are compared, and that it counts what it says. No test depends on a time."""

from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from geossl import cli
from geossl.cli import benchmark
from geossl.cli.benchmark import bars, event_steps, imports, neighbor_peers, ops, splat, steps, teacher_steps
from geossl.cli.benchmark import measure as measuring
from geossl.cli.benchmark.clouds import KINDS, clouds, surfaces
from geossl.cli.benchmark.measure import (
    Case,
    Sample,
    clock,
    copy_rate,
    count_flop,
    gemm_rate,
    measure,
    nbytes,
    peak_memory,
    release_memory,
    reset_peak_memory,
)
from geossl.cli.benchmark.row import Peer, Row, seconds, table_of
from geossl.errors import ConfigError, UnknownNameError
from geossl.layers import PointTokenEmbedding

KEYS = {
    *("suite", "name", "inputs", "threads", "dtype", "cpu_s", "wall_s", "repeats", "calls_per_repeat", "peak_mib", "rise_mib"),
    *("flop", "flop_is", "gemm_flops", "bytes", "bytes_is", "copy_bytes_per_s", "floor_s", "floor_ratio"),
    *("peer", "peer_cpu_s", "peer_ratio", "peers", "target_s", "step_cpu_s", "share_of_step", "load_average", "machine"),
    *("cloud", "caller_s", "bar", "aim"),
}
NO_TWIN = ("scatter_reduce", "segment_reduce", "neighbor_map", "radius_search")
ROOT = Path(__file__).parents[2]
LINUX = reset_peak_memory() is not None


@pytest.fixture(autouse=True)
def _thread_variables(monkeypatch):
    """The program sets these for the libraries it loads; give them back afterwards."""
    for variable in benchmark._THREAD_VARIABLES:
        monkeypatch.setenv(variable, "1")


def run(tmp_path, *args: str) -> list[dict]:
    assert benchmark.main([*args, "--json", str(tmp_path / "rows.json")]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((tmp_path / "rows.json").read_text(), parse_constant=refuse)


def check(rows: list[dict], suite: str) -> None:
    assert len({row["name"] for row in rows}) == len(rows) > 0
    for row in rows:
        assert set(row) == KEYS
        assert row["suite"] == suite
        assert row["threads"] == 1
        assert row["dtype"] in ("float32", "bfloat16")
        assert all(row[key] > 0 for key in ("cpu_s", "wall_s", "repeats", "calls_per_repeat", "gemm_flops", "copy_bytes_per_s", "bytes"))
        assert row["flop"] >= 0
        assert row["floor_s"] == pytest.approx(max(row["flop"] / row["gemm_flops"], row["bytes"] / row["copy_bytes_per_s"]))
        assert row["floor_ratio"] == pytest.approx(row["cpu_s"] / row["floor_s"])
        assert all(row[key] for key in ("inputs", "flop_is", "bytes_is", "machine"))
        if LINUX:
            assert row["peak_mib"] >= row["rise_mib"] >= 0
        for peer in row["peers"]:
            assert peer["differs"] == "", f"{row['name']}: {peer['name']}: {peer['differs']}"
            assert peer["ratio"] == pytest.approx(peer["cpu_s"] / row["cpu_s"])
        if row["peers"]:
            best = min(row["peers"], key=lambda peer: peer["cpu_s"])
            assert (row["peer"], row["peer_cpu_s"], row["peer_ratio"]) == (best["name"], best["cpu_s"], best["ratio"])


def test_steps_of_scales(tmp_path):
    rows = run(tmp_path, "steps", "--quick", "--method", "point_m2ae")
    check(rows, "steps")
    by_name = {row["name"]: row for row in rows}
    for dtype in ("float32", "bfloat16"):
        assert [peer["name"] for peer in by_name[f"point_m2ae/released/step/{dtype}"]["peers"]] == ["plain torch"]


def test_steps_with_a_teacher(tmp_path):
    rows = run(tmp_path, "steps", "--quick", "--method", "i2p_mae", "--rows", "i2p_mae/released*[!6]")  # without bfloat16
    check(rows, "steps")
    by_name = {row["name"]: row for row in rows}
    for name in ("projection", "back-projection"):
        assert by_name[f"i2p_mae/released/{name}"]["peer"] == "plain torch"
    stored, inside = (by_name[f"i2p_mae/released, {where}/step/float32"] for where in ("stored", "clip fp32"))
    assert [peer["name"] for peer in stored["peers"]] == ["plain torch"]
    assert inside["flop"] > stored["flop"]


def test_stereo_rows_agree_with_the_plain_head(tmp_path: Path) -> None:
    rows = run(tmp_path, "steps", "--quick", "--method", "croco", "--rows", "croco/stereo/*")
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {
        *("croco/stereo/forward", "croco/stereo/head"),
        *("croco/stereo/in windows, 1 of them", "croco/stereo/in windows, 4 of them"),
    }
    (peer,) = by_name["croco/stereo/head"]["peers"]
    assert not peer["differs"]


def test_steps_of_pairs_of_images(tmp_path):
    rows = run(tmp_path, "steps", "--quick", "--method", "croco", "--rows", "croco/*float32")
    check(rows, "steps")
    by_name = {row["name"]: row for row in rows}
    for variant in ("rope", "cosine"):
        step, layers = (by_name[f"croco/{variant}/{part}/float32"] for part in ("step", "linear layers"))
        assert [peer["name"] for peer in step["peers"]] == ["plain torch"]
        assert 0.7 * step["flop"] < layers["flop"] <= step["flop"]  # attention is the rest


def test_steps(tmp_path, capsys):
    rows = run(tmp_path, "steps", "--quick", "--method", "point_mae")
    check(rows, "steps")
    by_name = {row["name"]: row for row in rows}
    for dtype in ("float32", "bfloat16"):
        for name in ("released/step", "quickstart/step", "released/features"):
            row = by_name[f"point_mae/{name}/{dtype}"]
            assert row["peer"] == "plain torch"
            assert row["flop"] > 0
    assert by_name["point_mae/released/optimizer"]["peers"]
    assert "point_mae/released/grouping" in by_name
    shown = capsys.readouterr().out
    assert "written to" in shown
    assert "load average" in shown


def test_ops(tmp_path):
    rows = run(tmp_path, "ops", "--quick", "--threads", "1")
    check(rows, "ops")
    assert {row["name"].partition("/")[0] for row in rows} >= {
        "farthest_point_sample", "knn", "ball_query", "group", "chamfer_distance", "chamfer_distance_patches",
    }  # fmt: skip
    assert all("geossl.ops.reference" in [peer["name"] for peer in row["peers"]] for row in rows if not row["name"].startswith(NO_TWIN))
    assert {row["cloud"] for row in rows} == {"", *KINDS}
    assert all(row["name"].endswith(f"/{row['cloud']}") for row in rows if row["cloud"])
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_splat(tmp_path):
    rows = run(tmp_path, "splat", "--quick", "--threads", "1")
    check(rows, "splat")
    splats, rooms = rows[:2], rows[2:]
    assert [row["name"].endswith("backward") for row in splats] == [False, True]
    assert all(row["peer"] == "plain torch by tiles" for row in splats)
    assert [row["name"].partition("/")[0] for row in rooms] == ["room", "room"]
    assert all(row["target_s"] for row in rooms)


def test_data(tmp_path):
    rows = run(tmp_path, "data", "--quick")
    check(rows, "data")
    batches, events, pairs = rows[:-4], rows[-4:-2], rows[-2:]
    assert {row["name"].partition("/")[0] for row in batches} == {"objects", "shards"}
    for row in batches:
        assert row["share_of_step"] == pytest.approx(row["cpu_s"] / row["step_cpu_s"])
    assert [row["name"] for row in events] == ["events/shards", "events/simulated"]
    assert events[0]["peer"] == "PILArNet-M HDF5"
    assert [row["name"] for row in pairs] == ["pairs/shards", "pairs/mining"]


@pytest.mark.slow
def test_import(tmp_path):
    rows = run(tmp_path, "import", "--quick")
    check(rows, "import")
    assert rows[0]["peer"] == "import torch"
    assert rows[0]["target_s"] == imports.TARGET


def test_steps_of_events(tmp_path):
    rows = run(tmp_path, "steps", "--quick", "--method", "polar_mae")
    check(rows, "steps")
    by_name = {row["name"]: row for row in rows}
    for name in ("released", "point-mae"):
        for dtype in ("float32", "bfloat16"):
            assert [peer["name"] for peer in by_name[f"polar_mae/{name}/step/{dtype}"]["peers"]] == ["plain torch, padded"]
            assert by_name[f"polar_mae/{name}, drops/step/{dtype}"]["peers"] == []
    assert by_name["polar_mae/released/features/float32"]["peers"]
    assert {"polar_mae/released/tokenizer", "polar_mae/released/grouping", "polar_mae/growth/1 events"} < set(by_name)


def test_rows_can_be_chosen(tmp_path):
    (row,) = run(tmp_path, "ops", "--quick", "--threads", "1", "--rows", "knn/2x*")
    assert row["name"].startswith("knn/")


# What full runs measure -----------------------------------------------------------------------------------------------------------------


def test_full_runs_hold_the_sizes_and_targets_of_the_design():
    names = steps.cases("point_mae", quick=False)
    assert {name for name in names if "/released/step/" in name} == {f"point_mae/released/step/{x}" for x in ("float32", "bfloat16")}
    assert steps.STEPS["point_mae"].targets == {torch.float32: 1.0, torch.bfloat16: 0.65}
    step = steps.build_step("point_mae", "released")
    config = step.module.backbone.config
    assert (config.dim, config.depth, config.heads, config.groups, config.group_size, config.drop_path) == (384, 12, 6, 64, 32, 0.1)
    assert (len(step.batch), step.batch.points.coord.shape[0], step.module.training) == (8, 8 * 2048, True)
    assert event_steps.TARGETS[("polar_mae", False, torch.float32)] == 1.6
    assert {f"polar_mae/growth/{n} events" for n in (1, 2, 4, 8, 16)} < set(steps.cases("polar_mae", quick=False))
    assert len([name for name in steps.cases("i2p_mae", quick=False) if "/step/" in name]) == 4
    assert teacher_steps.TARGETS[("stored", torch.float32)] == 3.0
    calls = [case() for name, case in ops.cases(quick=False).items() if "8 of 8" in name or "8 to 8" in name or name.endswith("/8->4")]
    assert [case.target for case in calls] == [ops.CALL_TARGET] * 6


# Plain forms and agreement --------------------------------------------------------------------------------------------------------------


def test_disagreement_of_gradients_is_seen():
    good = {"loss": torch.tensor(2.0), "a": torch.randn(5), "b": torch.randn(3, 2)}
    assert steps._gradients_differ(good, good, torch.float32) == ""
    assert "loss" in steps._gradients_differ(good, {**good, "loss": torch.tensor(2.001)}, torch.float32)
    assert "cosine" in steps._gradients_differ(good, {**good, "b": -good["b"]}, torch.float32)
    assert "no gradient for ['b']" in steps._gradients_differ(good, {"loss": good["loss"], "a": good["a"]}, torch.float32)


def test_a_step_with_its_optimiser_leaves_the_weights_alone():
    """So that all samples, and the peer's answers, belong to the same weights."""
    step = event_steps.build_step("polar_mae", True, event_steps.typical_events(quick=True), quick=True)
    before = [p.detach().clone() for p in step.module.parameters()]
    event_steps.whole_step(step, torch.float32)()
    assert all(torch.equal(a, b) for a, b in zip(before, step.module.parameters(), strict=True))


def test_one_event_may_be_far_larger_than_the_rest():
    sizes = sorted(len(sample.points) for sample, _ in event_steps.event_pool(quick=True))
    assert len(event_steps.larger_event(quick=True).points) > 0.9 * sum(sizes)


def test_plain_step_notices_a_wrong_loss():
    step = steps.build_step("point_mae", "released", quick=True)
    ours = steps.step_run(step, torch.float32)()
    wrong = steps.step_run(step, torch.float32, lambda *args: 1.01 * steps.point_mae_loss(*args))()
    assert steps._gradients_differ(ours, wrong, torch.float32) != ""


def test_picks_may_start_elsewhere_but_must_be_farthest():
    points = surfaces(1, 64)
    ours = torch.tensor([[0, *range(1, 8)]])
    elsewhere = ops.ops.farthest_point_sample(points, 8, start=5)
    assert ops._picks_differ(points, ours, elsewhere) == ""
    swapped = elsewhere[:, [0, 2, 1, *range(3, 8)]]
    assert ops._picks_differ(points, ours, swapped) == "pick 1 is not farthest from those before it"
    assert "shape" in ops._picks_differ(points, ours, elsewhere[:, :4])


def test_distances_are_compared():
    found = (torch.tensor([[0.01, 0.04]]), None)
    assert neighbor_peers.distances_differ(found, (torch.tensor([[0.01, 0.04 + 1e-8]]), None)) == ""
    assert neighbor_peers.distances_differ(found, (torch.tensor([[0.01, 0.05]]), None)) == "1 of 2 distances differ"
    assert neighbor_peers.distances_differ(found, (torch.tensor([[0.01, torch.inf]]), None)) != ""
    assert neighbor_peers.distances_differ(found, (torch.tensor([[0.01, torch.inf]]), None), radius=0.2) == ""  # on the sphere: in or out
    assert neighbor_peers.distances_differ(found, (torch.tensor([[0.01, torch.inf]]), None), radius=0.3) != ""


def test_values_are_compared():
    ours = [torch.tensor(1.0), torch.ones(3)]
    assert ops.values_differ(ours, [torch.tensor(1.0), torch.ones(3)]) == ""
    assert ops.values_differ(ours, [torch.tensor(1.0), torch.tensor([1.0, 1, 2])]).startswith("gradient differs")
    assert ops.values_differ(ours, [torch.tensor(math.nan), torch.ones(3)]).startswith("result differs")


def test_gradients_may_differ_where_neighbours_tie():
    x, y = torch.tensor([[[0.0, 0, 0]]]), torch.tensor([[[1.0, 0, 0], [-1.0, 0, 0]]])
    to_y = torch.tensor([[[1.0, 0, 0], [-1.0, 0, 0]]])
    ours, theirs, wrong = ([torch.tensor(2.0), torch.tensor([[[sign, 0, 0]]]), to_y + torch.tensor([[[a, 0, 0], [b, 0, 0]]])]
                           for sign, a, b in ((-2.0, 2.0, 0.0), (2.0, 0.0, -2.0), (2.0, 0.0, 2.0)))  # fmt: skip
    assert ops.values_differ(ours, theirs) != ""
    assert ops._losses_differ(x, y, ours, theirs) == ""
    assert "gradient" in ops._losses_differ(x, y, ours, wrong)
    assert "result" in ops._losses_differ(x, y, ours, [theirs[0] + 1, *theirs[1:]])


# Measuring ------------------------------------------------------------------------------------------------------------------------------


def a_case(**changes) -> Case:
    known = {"inputs": "something", "run": lambda: 1, "moved": 8, "moved_is": "eight bytes", "flop": 0, "flop_is": "none"}
    return Case(**known | changes)


def test_peers_take_turns_and_medians_are_taken():
    order, times = [], {"ours": iter([19.0, 9.0, 3.0, 4.0, 5.0]), "theirs": iter([19.0, 9.0, 8.0, 10.0, 12.0])}

    def fake_clock(run, calls):
        name = run()
        order.append(name)
        cpu = next(times[name]) * 1e-1
        return Sample(cpu, 2 * cpu, 100.0 + len(order), 1.0)

    case = a_case(run=lambda: "ours", peers={"peer": lambda: "theirs"}, clock=fake_clock, share_of=4.0)
    row = measure("suite", "name", case, repeats=4)
    assert order == ["ours", "theirs"] * 5  # one call each for the memory, then the samples
    assert row.cpu_s == pytest.approx(0.45)  # of 0.9 0.3 0.4 0.5
    assert row.wall_s == pytest.approx(0.9)
    assert row.peer_cpu_s == pytest.approx(0.95)
    assert row.peer_ratio == pytest.approx(0.95 / 0.45)
    assert (row.peak_mib, row.rise_mib, row.peers[0].peak_mib) == (101.0, 1.0, 102.0)
    assert (row.repeats, row.calls_per_repeat) == (4, 1)
    assert row.share_of_step == pytest.approx(0.45 / 4)


def test_slow_calls_are_sampled_less_often():
    order = []
    case = a_case(run=lambda: order.append("slow"), peers={"peer": lambda: order.append("quick")})

    def fake_clock(run, calls):
        run()
        return Sample(2.5 if order[-1] == "slow" else 1.0, 1.0, None, None)

    row = measure("suite", "name", replace(case, clock=fake_clock, warm=False), repeats=5)
    assert row.repeats == 3
    assert order.count("quick") == 2 + 5  # the answer and the memory first
    assert row.peak_mib is None


def test_quick_calls_are_repeated_within_a_sample():
    count = 0

    def call():
        nonlocal count
        count += 1

    row = measure("suite", "name", a_case(run=call), repeats=2)
    assert row.calls_per_repeat > 100
    warm_up = count - 2 - 2 * row.calls_per_repeat  # besides the answer, the call for the memory and the samples
    assert 1 <= warm_up < row.calls_per_repeat
    assert row.cpu_s < 1e-3


def test_peer_that_differs_or_fails_is_shown_but_not_the_peer():
    def broken():
        raise OSError("no such library")

    peers = {"wrong": lambda: 2, "broken": broken, "right": lambda: sum(range(20_000)) * 0 + 1}
    case = a_case(peers=peers, differs=lambda ours, theirs: "" if ours == theirs else f"{theirs} instead of {ours}")
    row = measure("suite", "name", case, repeats=2)
    wrong, failed, right = row.peers
    assert wrong.differs == "2 instead of 1"
    assert wrong.cpu_s is not None
    assert (failed.differs, failed.cpu_s) == ("failed: OSError: no such library", None)
    assert row.peer == right.name == "right"  # though the wrong one is quicker


def test_flop_of_every_form_of_product():
    a, b, c = torch.randn(8, 16), torch.randn(16, 4), torch.zeros(8, 4)
    assert count_flop(lambda: torch.mm(a, b)) == 2 * 8 * 16 * 4
    assert count_flop(lambda: torch.mm(a, b, out=c)) == 2 * 8 * 16 * 4
    assert count_flop(lambda: c.addmm_(a, b)) == 2 * 8 * 16 * 4
    assert count_flop(lambda: torch.addmm(c, a, b)) == 2 * 8 * 16 * 4
    assert count_flop(lambda: a @ b[:, 0]) == 2 * 8 * 16
    assert count_flop(lambda: torch.zeros(3, 2, 5).baddbmm_(torch.ones(3, 2, 7), torch.ones(3, 7, 5))) == 2 * 3 * 2 * 7 * 5
    assert count_flop(lambda: F.linear(a.bfloat16(), b.T.bfloat16())) == 2 * 8 * 16 * 4
    assert count_flop(lambda: a + a) == 0


def test_flop_of_attention_and_its_backward():
    q, k, v = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (64, 48, 48))
    product = 2 * 2 * 3 * 64 * 48 * 16
    assert count_flop(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert count_flop(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


def test_flop_inside_a_custom_function():
    weight = torch.randn(16, 4)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ weight

        @staticmethod
        def backward(ctx, grad):
            return grad @ weight.T

    x = torch.randn(8, 16, requires_grad=True)
    assert count_flop(lambda: Twice.apply(x).sum().backward()) == 2 * (2 * 8 * 16 * 4)


def test_fast_token_embedding_needs_fewer_operations_than_the_plain_one():
    """So the counter sees inside its custom function, forward and backward."""
    embed = PointTokenEmbedding(96)
    groups = torch.randn(128, 32, 3)
    fast = count_flop(lambda: embed(groups, torch.arange(0, 128, 3)).sum().backward())
    plain = count_flop(lambda: embed.reference(groups).sum().backward())
    assert 0.4 * plain < fast < 0.8 * plain


@pytest.mark.skipif(not LINUX, reason="peak memory is read from /proc")
def test_peak_memory_is_that_of_the_sample():
    def large():
        torch.ones(32 << 20, dtype=torch.uint8)

    release_memory()
    assert clock(large, 1).rise >= 31
    release_memory()
    assert clock(lambda: None, 1).rise < 8  # the mark was reset
    assert peak_memory() > 50


@pytest.mark.skipif(not LINUX, reason="peak memory is read from /proc")
def test_memory_of_a_row_is_what_a_call_needs():
    row = measure("suite", "name", a_case(run=lambda: torch.ones(4 << 20) + torch.ones(4 << 20), peers={"none": lambda: 1}), 1)
    assert 45 <= row.rise_mib < 60  # three times 16 MiB
    assert row.peers[0].peak_mib < row.peak_mib


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="page faults are counted as Linux does")
def test_operators_are_measured_without_new_pages():
    """In a process of its own, since the setting lasts."""
    code = (
        "import torch\n"
        "from geossl.cli.benchmark.measure import keep_memory, page_faults, settle\n"
        "keep_memory()\n"
        "call = lambda: torch.ones(4 << 20)\n"
        "settle([call])\n"
        "before = page_faults()\n"
        "for _ in range(10): call()\n"
        "print(page_faults() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000  # ten times 16 MiB would be 40,960 pages


@pytest.mark.slow
def test_import_is_not_compiled_anew_each_time(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    _, _, moved = imports._import("import geossl")
    assert moved > 300


def test_settling_ends_when_no_more_pages_are_asked_for(monkeypatch):
    rounds = [5000, 0, 4000, 10, 0, 0, 10]  # the second is quiet by luck, and ends nothing
    before = [sum(rounds[:i]) for i in range(8)]
    faults, calls = iter([count for pair in itertools.pairwise(before) for count in pair]), []
    monkeypatch.setattr(measuring, "page_faults", lambda: next(faults))
    measuring.settle([lambda: calls.append("a"), lambda: calls.append("b")])
    assert calls == ["a", "b"] * 7
    monkeypatch.setattr(measuring, "page_faults", iter(range(0, 10**9, 5000)).__next__)
    monkeypatch.setattr(measuring, "SETTLE_SECONDS", 0.0)
    measuring.settle([lambda: calls.append("c")])
    assert calls.count("c") == 1


def test_rates_are_measured_once_and_make_sense():
    assert gemm_rate(torch.float32) > 1e8
    assert gemm_rate(torch.float32) == gemm_rate(torch.float32)
    assert copy_rate(torch.bfloat16, 100) > 1e6
    assert copy_rate(torch.float32, 1 << 20) == copy_rate(torch.float32, (1 << 20) + 5)
    assert nbytes(torch.zeros(3, 2), torch.zeros(4, dtype=torch.bfloat16)) == 24 + 8


def test_clouds_are_the_same_every_time_and_lie_in_the_unit_ball():
    points = surfaces(3, 50)
    assert torch.equal(points, surfaces(3, 50))
    assert not torch.equal(points, surfaces(3, 50, seed=1))
    assert points.shape == (3, 50, 3)
    assert float(points.norm(dim=2).max()) <= 1.0
    assert float(points.norm(dim=2).min()) > 0.1


# Rows and table -------------------------------------------------------------------------------------------------------------------------


def test_floor_is_the_larger_of_arithmetic_and_memory():
    known = {f.name: "x" for f in fields(Row) if f.name in ("suite", "name", "inputs", "dtype", "flop_is", "bytes_is", "machine")}
    known |= {"threads": 1, "wall_s": 1.0, "repeats": 1, "calls_per_repeat": 1, "peak_mib": None, "rise_mib": None, "load_average": 0.0}
    row = Row.of(cpu_s=6.0, flop=30, gemm_flops=10.0, bytes=8, copy_bytes_per_s=4.0, peers=[], **known)
    assert (row.floor_s, row.floor_ratio, row.peer, row.peer_ratio) == (3.0, 2.0, None, None)
    row = Row.of(
        cpu_s=6.0, flop=30, gemm_flops=10.0, bytes=16, copy_bytes_per_s=4.0, peers=[Peer(name="a", differs="yes", cpu_s=1.0)], **known
    )
    assert (row.floor_s, row.peer) == (4.0, None)
    assert set(row.as_json()) == KEYS


def test_table_says_whether_a_target_is_met(capsys):
    from rich.console import Console

    rows = [measure("suite", "the row", a_case(target=target, peers={"a peer": lambda: 1}), 1) for target in (100.0, 1e-12)]
    Console(width=200).print(table_of(rows))
    shown = capsys.readouterr().out
    assert "met: 100 s" in shown
    assert "missed" in shown
    assert "a peer" in shown


# Bars -----------------------------------------------------------------------------------------------------------------------------------


def bar_row(name: str, cloud: str, cpu: float, peer: float | None, threads: int = 1, wall: float = 1.0) -> Row:
    known = {"suite": "ops", "inputs": "x", "dtype": "float32", "flop_is": "x", "bytes_is": "x", "machine": "x", "load_average": 0.0}
    known |= {"repeats": 1, "calls_per_repeat": 1, "peak_mib": None, "rise_mib": None, "bytes": 8, "cloud": cloud}
    peers = [] if peer is None else [Peer(name="a", cpu_s=peer, ratio=peer / cpu)]
    return Row.of(
        name=f"{name}/{cloud}", cpu_s=cpu, flop=0, gemm_flops=1.0, copy_bytes_per_s=1.0, peers=peers, threads=threads, wall_s=wall, **known
    )


def test_bars_ask_for_the_geometric_mean_and_for_every_kind():
    name = "farthest_point_sample/100000->4096"
    rows = [bar_row(name, "uniform", 1.0, 1.2), bar_row(name, "mesh", 1.0, 2.7), bar_row("no bar", "mesh", 1.0, 1.0)]
    (group,) = bars.groups_of(rows)
    assert (group.name, group.threads, group.least) == (name, 1, 1.2)
    assert group.mean == pytest.approx(1.8)
    assert group.reaches(1.79)
    assert not group.reaches(1.81)
    assert not group.reaches(1.3, least=1.25)
    (alone,) = bars.groups_of([bar_row(name, "mesh", 1.0, None)])
    assert alone.mean is None
    assert alone.reaches(1.0) is None


def test_growth_is_the_power_of_the_size():
    assert bars.exponent(2.0, 200.0, 10, 100) == pytest.approx(2.0)
    small, large = "farthest_point_sample/10000->1024", "farthest_point_sample/100000->4096"
    rows = [bar_row(small, "mesh", 1.0, 1.0), bar_row(large, "mesh", 10.0, 1000.0), bar_row(large, "uniform", 1.0, None)]
    (found,) = bars.growth_of(bars.groups_of(rows))
    assert (found["small"], found["large"], found["cloud"]) == (small, large, "mesh")
    assert (found["ours"], found["peer"]) == (pytest.approx(1.0), pytest.approx(3.0))


def test_speed_up_is_of_wall_time_over_the_same_kinds():
    name = "knn/512 of 2048, k=16"
    rows = [bar_row(name, "mesh", 1.0, 1.0, threads, wall) for threads, wall in ((1, 3.0), (2, 2.0))]
    assert bars.speed_ups(bars.groups_of(rows)) == {name: {2: 1.5}}
    assert bars.speed_ups(bars.groups_of([*rows, bar_row(name, "uniform", 1.0, 1.0)])) == {}
    assert bars.speed_ups(bars.groups_of(rows), "caller_s") == {}  # not measured
    for row in rows:
        row.caller_s = 1 / row.threads
    assert bars.speed_ups(bars.groups_of(rows), "caller_s") == {name: {2: 2.0}}


def test_every_bar_has_its_rows():
    names = set(ops.cases(quick=False))
    alone = {name for name in bars.BARS if name.startswith("rasterize_gaussians")}
    assert alone == {name for name in splat.cases(quick=False) if not name.startswith("room/")}
    for name in bars.BARS:
        if not name.startswith("voxelize") and name not in alone:
            assert {f"{name}/{kind}" for kind in KINDS} <= names


def test_bars_are_shown(capsys):
    name = "knn/512 of 2048, k=16"
    rows = [bar_row(name, kind, 1.0, 1.5, threads, 1.0 / threads) for threads in (1, 2) for kind in KINDS]
    benchmark._show(rows)
    shown = capsys.readouterr().out
    assert "met: 1.2" in shown
    assert "missed: 2" in shown
    assert "was busy" not in shown
    rows[0].load_average = 1e4
    benchmark._show(rows)
    assert "the machine was busy (load average up to 10000.0)" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_each_number_of_threads_has_a_process_of_its_own(tmp_path):
    rows = run(tmp_path, "ops", "--quick", "--threads", "1,2", "--rows", "group/2x16x4 of 128, 8 channels")
    assert [(row["name"], row["threads"]) for row in rows] == [
        ("group/2x16x4 of 128, 8 channels", 1),
        ("group/2x16x4 of 128, 8 channels", 2),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_cloud_are_the_same_every_time_and_lie_in_the_unit_cube(kind):
    points = clouds(kind, 2, 400)
    assert points.shape == (2, 400, 3)
    assert torch.equal(points, clouds(kind, 2, 400))
    assert not torch.equal(points[0], points[1])
    assert not torch.equal(points, clouds(kind, 2, 400, seed=1))
    assert 0 <= float(points.min()) < float(points.max()) < 1
    different = len(points[0].unique(dim=0))
    assert different <= 200 if kind == "duplicates" else different == 400


def test_a_peer_that_has_lost_is_timed_once():
    order = []
    case = a_case(run=lambda: order.append("ours"), peers={"peer": lambda: order.append("peer")})

    def fake_clock(run, calls):
        run()
        return Sample(0.001 if order[-1] == "ours" else 5.0, 1.0, None, None)

    row = measure("suite", "name", replace(case, clock=fake_clock, warm=False), repeats=4)
    assert (order.count("ours"), order.count("peer")) == (6, 2)  # the answer and the memory come first
    assert (row.peers[0].repeats, row.peer_cpu_s) == (1, 5.0)


def test_looser_answers_are_compared_by_their_numbers():
    points = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.9, 0, 0]]])
    ours = (torch.zeros(1, 1, 4), None, torch.tensor([[3]]))
    differ = functools.partial(neighbor_peers.balls_differ, points[:, :1], points, 0.25, "nearest", ours)
    assert differ(neighbor_peers.Counts(torch.tensor([[3]]), None)) == ""
    assert "1 of 1 queries" in differ(neighbor_peers.Counts(torch.tensor([[9]]), None))
    assert differ(torch.tensor([[[0, 1, 2, 0]]])) == ""  # the first again fills the empty place
    assert differ(torch.tensor([[[0, 1, 3, 0]]])) == "1 neighbours outside the radius"


@pytest.mark.parametrize(("value", "text"), [(1.234e-7, "0.123 us"), (2.5e-5, "25 us"), (0.0021, "2.1 ms"), (1.5, "1.5 s"), (None, "")])
def test_times_are_readable(value, text):
    assert seconds(value) == text


# Bad input ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ([], ConfigError, "steps, ops, splat, data, import"),
        (["step"], UnknownNameError, "did you mean 'steps'"),
        (
            ["ops", "--quick", "--threads", "1", "--rows", "knm*"],
            ConfigError,
            "ops benchmark matches 'knm\\*'; there are: farthest",
        ),
        (["ops", "--threads", "0"], ConfigError, "threads must be numbers of at least 1"),
        (["ops", "--threads", "1,1"], ConfigError, "without repeats"),
        (["ops", "--threads", "two"], ConfigError, "such as 1 or 1,2"),
        (["ops", "--repeats", "0"], ConfigError, "repeats must be at least 1, got 0"),
        (["steps", "--quick", "--method", "point_mea"], UnknownNameError, "did you mean 'point_mae'"),
        (["ops", "--josn", "x"], UnknownNameError, "did you mean '--json'"),
    ],
)
def test_wrong_arguments(args, error, words, capsys):
    with pytest.raises(error, match=words):
        benchmark.main(args)


def test_method_without_a_step_benchmark(monkeypatch):
    monkeypatch.setattr(steps, "STEPS", {})
    with pytest.raises(ConfigError, match="point_mae has no step benchmark yet"):
        steps.cases("point_mae", quick=True)


def test_errors_end_as_one_line(capsys):
    assert cli.run("benchmark", ["opps"]) == 2
    assert capsys.readouterr().err.startswith("geossl benchmark: error: unknown benchmark 'opps'")
