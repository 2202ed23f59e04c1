"""Simulated particle events: the physics, the labels, the tokens, and how they compare with a real one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from geossl import ops
from geossl.data import DATASETS, Event, LArTPCConfig, LArTPCOptions, PILArNetFile, build_loader, simulate_event
from geossl.data.events import CLASSES, check_event
from geossl.data.simulate import lartpc
from geossl.errors import ConfigError, DataError

EVENTS = 40


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return [simulate_event(0, number) for number in range(EVENTS)]


def labels(event: Event) -> np.ndarray:
    return np.repeat(event.clusters[:, 4], event.clusters[:, 0])


def test_events_keep_the_rules_of_the_layout(events: list[Event]) -> None:
    for number, event in enumerate(events):
        check_event(event, f"event {number}")
        assert 1024 <= len(event) < 10_000
        assert len(np.unique(event.voxel, axis=0)) == len(event)
        assert event.energy.min() > 0
        size, fragment, group, interaction, semantic, particle = event.clusters.T
        assert size.sum() == len(event)
        assert (size[1:] > 0).all()
        assert fragment.tolist() == list(range(-1, len(fragment) - 1))
        assert event.clusters[0, 1:].tolist() == [-1, -1, -1, 4, -1]
        assert (group[1:] <= fragment[1:]).all()
        assert set(group[1:].tolist()) <= set(fragment[1:].tolist())
        assert (interaction[1:] >= 0).all()
        assert np.isin(particle[semantic == 1], (2, 3, 4)).all()
        assert (particle[(semantic == 2) | (semantic == 3)] == 1).all()
        for head in np.unique(group[1:]):  # a group is one particle with all it became
            assert len(np.unique(semantic[group == head])) == 1
        assert event.extra is not None
        assert np.allclose(event.extra[1:, 0], lartpc.MASS[particle[1:]])


def test_an_event_depends_on_seed_stream_and_number_alone(events: list[Event]) -> None:
    again = simulate_event(0, 7)
    assert all(np.array_equal(a, b) for a, b in zip(vars(events[7]).values(), vars(again).values(), strict=True))
    others = [simulate_event(1, 7), simulate_event(0, 8), simulate_event(0, 7, stream=1)]
    assert all(len(other) != len(again) or not np.array_equal(other.voxel, again.voxel) for other in others)


def simulation(seed: int = 0) -> lartpc._Simulation:
    made = lartpc._Simulation(np.random.default_rng(seed), LArTPCOptions())
    made.new_fragment(-1, -1, lartpc.LED, -1, -1.0, np.zeros(3))
    return made


def bunch(amount: float, count: int, semantic: int, made: lartpc._Simulation) -> lartpc._Bunch:
    """Particles that leave the middle of the detector along x."""
    start = np.full((count, 3), lartpc.BOX / 2)
    rows = [made.new_fragment(-1, 0, semantic, 1, 0.0, start[0]) for _ in range(count)]
    return lartpc._Bunch(start, np.tile([1.0, 0.0, 0.0], (count, 1)), np.full(count, amount), np.array(rows))


@pytest.mark.parametrize("particle", [lartpc.MUON, lartpc.PION, lartpc.PROTON])
def test_tracks_end_in_a_bragg_peak(particle: int) -> None:
    made, steps = simulation(), []
    made.deposit = lambda *step: steps.append(step)  # type: ignore[method-assign]
    made.track(bunch(20.0, 50, lartpc.TRACK, made), particle)
    ((position, _, energy, fragment),) = steps
    loss = energy.reshape(50, 200).mean(0) / lartpc.STEP  # MeV/cm by path
    start, end = loss[:50].mean(), loss[-5:].mean()
    assert end > 3 * start
    assert 0.85 < loss.mean() / (lartpc._kinetic(np.array(20.0), particle) / 20.0) < 1.1  # of the kinetic energy
    assert loss[-20:].mean() > loss[-60:-20].mean() > 0.95 * loss[:100].mean()
    lengths = np.linalg.norm(np.diff(position.reshape(50, 200, 3), axis=1), axis=2)
    assert np.all(lengths <= lartpc.STEP * (1 + 1e-9))
    assert fragment.min() >= 1


def test_range_and_energy_agree() -> None:
    residual = np.linspace(0.05, 100, 2000)
    for particle in (lartpc.MUON, lartpc.PION, lartpc.PROTON):
        slope = np.gradient(lartpc._kinetic(residual, particle), residual)
        mean = np.maximum(lartpc.MINIMUM_LOSS, lartpc._BRAGG[particle] * residual**-0.42)
        assert np.allclose(slope[5:-5], mean[5:-5], rtol=0.02)
    assert 220 < lartpc._kinetic(np.array(100.0), lartpc.MUON) < 300  # MeV; 100 cm in argon is about 250 MeV


def test_losses_fluctuate_as_landau_does() -> None:
    loss = lartpc._fluctuate(np.random.default_rng(0), np.full(100_000, 2.1))
    assert 0.16 < np.median(loss) < loss.mean() < 0.21
    assert loss.min() > 0.1
    assert np.quantile(loss, 0.99) > 1.3 * np.median(loss)  # a tail on one side


@pytest.mark.parametrize("energy", [3.0, 40.0, 250.0])
def test_electrons_leave_all_their_energy(energy: float) -> None:
    made = simulation()
    photons = made.electrons(bunch(energy, 30, lartpc.SHOWER, made))
    deposited = np.bincount(np.concatenate([f for _, _, f in made.deposits]), np.concatenate([e for _, e, _ in made.deposits]), 31)[1:]
    radiated = np.bincount(photons.fragment, photons.amount, 31)[1:]
    assert np.allclose(deposited + radiated, energy, rtol=1e-6)
    if energy > 100:
        assert 0.5 < radiated.mean() / energy < 0.95
    if len(photons):
        assert photons.amount.min() > 0.5


def test_showers_conserve_energy_up_to_pair_masses() -> None:
    made = simulation(1)
    before = bunch(100.0, 20, lartpc.SHOWER, made)
    made.shower([before], [])
    total = sum(energy.sum() for _, energy, _ in made.deposits)
    pairs = len(made.fragments) - 21
    assert pairs > 20
    escaped = 2000.0 - total - pairs * 2 * lartpc.MASS[lartpc.ELECTRON]
    assert -1e-6 < escaped < 200  # photons that leave the detector


def test_michel_spectrum() -> None:
    x = lartpc._michel_fraction(np.random.default_rng(0), 20_000)
    edges = np.linspace(0, 1, 11)
    expected = np.diff(2 * (edges**3 - edges**4 / 2))
    assert np.abs(np.histogram(x, edges)[0] / len(x) - expected).max() < 0.01


def test_directions_are_those_of_chained_rotations() -> None:
    rng = np.random.default_rng(0)
    start = lartpc._isotropic(rng, 3)
    owner, step = lartpc._spread(np.array([1, 37, 6]))
    x, y = rng.normal(size=(2, len(owner))) * 0.7
    got = lartpc._directions(start, owner, step, x, y)
    u, v = lartpc._across(start)
    for particle in range(3):
        frame = np.stack([start[particle], u[particle], v[particle]], 1)
        assert np.allclose(frame.T @ frame, np.eye(3))
        assert np.linalg.det(frame) == pytest.approx(1)
        turned = Rotation.identity()
        for row in np.flatnonzero(owner == particle):
            turned = turned * Rotation.from_rotvec([0.0, x[row], y[row]])
            assert np.allclose(got[row], frame @ turned.apply([1.0, 0.0, 0.0]), atol=1e-12)


def test_the_energy_of_a_step_is_shared_by_length_among_the_voxels_it_crosses() -> None:
    made, rng = simulation(), np.random.default_rng(0)
    middle, direction = rng.uniform(1, 2, (200, 3)), lartpc._isotropic(rng, 200)
    direction[:2] = [[1, 0, 0], [0, -1, 0]]
    energy = rng.uniform(0.1, 1, 200)
    made.deposit(middle, direction, energy, np.arange(200))
    ((position, shared, step),) = made.deposits
    assert np.allclose(np.bincount(step, shared), energy)
    cells = np.floor(position / lartpc.PITCH).astype(int)
    for row in range(200):
        along = (np.arange(10_000) + 0.5) / 10_000 - 0.5
        points = middle[row] + along[:, None] * lartpc.STEP * direction[row]
        expected, counts = np.unique(np.floor(points / lartpc.PITCH).astype(int), axis=0, return_counts=True)
        got = cells[step == row]
        assert len(np.unique(got, axis=0)) == len(got)
        for cell, part in zip(got, shared[step == row], strict=True):
            same = (expected == cell).all(1)
            assert abs(part / energy[row] - (counts[same].sum() / 10_000)) < 3e-4


def test_a_voxel_belongs_to_the_fragment_that_left_most() -> None:
    made = simulation()
    one, two = (made.new_fragment(-1, 0, semantic, 1, 0.0, np.zeros(3)) for semantic in (0, 1))
    made.deposits.append((np.full((3, 3), 0.1), np.array([1.0, 1.0, 1.5]), np.array([one, one, two])))
    made.deposits.append((np.array([[0.4, 0.1, 230.39], [-0.1, 1.0, 1.0], [0.1, 0.1, 230.41]]), np.ones(3), np.array([0, one, one])))
    event = made.voxelise()
    assert event.voxel.tolist() == [[1, 0, 767], [0, 0, 0]]
    assert event.energy.tolist() == [1.0, 3.5]
    assert event.clusters[:, [0, 4]].tolist() == [[1, 4], [1, 0]]  # the track lost its voxel, and is gone


def test_every_kind_of_particle_is_there(events: list[Event]) -> None:
    counts = sum(np.bincount(labels(event), minlength=5) for event in events)
    share = counts / counts.sum()
    assert share[:2].min() > 0.2
    assert 0.005 < share[2] < 0.1
    assert 0.01 < share[3] < 0.15
    assert 0.01 < share[4] < 0.2


def test_cosmic_muons_cross_the_detector() -> None:
    event = simulate_event(0, 0, LArTPCOptions(vertices=(1, 1), primaries=(1, 1), cosmics=6.0), min_points=0)
    muons = np.flatnonzero((event.clusters[:, 5] == 2) & (event.clusters[:, 3] >= 1))
    assert len(muons) >= 2
    assert event.voxel[:, 1].max() == 767  # they come in from above
    assert event.extra is not None
    assert event.extra[muons, 1].min() > 1.0  # GeV


def test_tokens_of_an_event_are_as_many_as_published(events: list[Event]) -> None:
    radius = 2 * 5 * 0.72
    counts = []
    for event in events[:20]:
        kept = event.voxel[event.clusters[0, 0] :][event.energy[event.clusters[0, 0] :] > 0.13]
        counts.append(len(ops.centrality_nms(torch.from_numpy(kept.astype(np.float32))[None], radius, max_neighbors=256).index))
    assert min(counts) >= 50
    assert max(counts) <= 500


@pytest.mark.skipif("GEOSSL_REAL_DATA" not in os.environ, reason="GEOSSL_REAL_DATA is not set")
def test_voxel_energies_are_like_those_of_a_real_event(events: list[Event]) -> None:
    real = PILArNetFile(Path(os.environ["GEOSSL_REAL_DATA"]) / "lartpc" / "pilarnet_m_test_event7675.h5").read(0)
    ours_label, ours = np.concatenate([labels(event) for event in events]), np.concatenate([event.energy for event in events])
    for name, factors in {"shower": (1.2, 1.25, 1.6), "track": (1.2, 1.25, 1.6), "led": (1.2, 1.4, 1.5)}.items():
        semantic = CLASSES.index(name)
        theirs = real.energy[labels(real) == semantic]
        mine = ours[(ours_label == semantic) & (ours > 0.13)]
        for level, factor in zip((0.05, 0.5, 0.95), factors, strict=True):
            ratio = np.quantile(mine, level) / np.quantile(theirs, level)
            assert 1 / factor < ratio < factor, f"{name} {level}: {ratio:.2f}"


def test_the_data_set_gives_equal_batches_for_any_number_of_workers(tmp_path: Path) -> None:
    config = LArTPCConfig(events=6, val_events=3, keep=2, cache=tmp_path)
    made = LArTPCConfig(events=6, val_events=3).build("train")
    cached = config.build("train")
    assert [len(config.build(split)) for split in ("train", "val", "test")] == [6, 3, 3]
    assert cached.channels == 4
    assert cached.classes == ["shower", "track", "michel", "delta"]
    assert LArTPCConfig(remove_led=False).build("val").classes == list(CLASSES)
    alone, parallel = build_loader(made, 3, seed=0), build_loader(cached, 3, seed=0, workers=2)
    for _ in range(4):
        a, b = next(alone), next(parallel)
        assert torch.equal(a.points.coord, b.points.coord)
        assert a.points.feats is not None
        assert b.points.feats is not None
        assert torch.equal(a.points.feats, b.points.feats)
        assert a.point_label is not None
        assert b.point_label is not None
        assert torch.equal(a.point_label, b.point_label)
        assert a.points.feats.shape == (len(a.point_label), 1)
    parallel.close()
    assert len(list(tmp_path.glob("lartpc-*/train/*.npz"))) == 6
    assert len(pickle.dumps(made)) < 5000  # events do not travel
    val, test = config.build("val").get(0), config.build("test").get(0)
    assert val.points.shape != test.points.shape or not np.array_equal(val.points, test.points)
    assert cached.source(3) == "lartpc event 3 of seed 0"


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="lartpc: unknown split 'dev'; choose one of train, val, test"):
        DATASETS.config("lartpc").build("dev")
    monkeypatch.setattr(lartpc, "_TRIES", 3)
    with pytest.raises(DataError, match="none of 3 events had min_points=100000 voxels"):
        simulate_event(0, 0, min_points=100_000)
    for options, message in (({"events": 0}, "events must be"), ({"seed": -1}, "seed must"), ({"keep": -1}, "keep must")):
        with pytest.raises(ConfigError, match=message):
            LArTPCConfig(**options)
    for options, message in (({"vertices": (2, 1)}, "vertices must be two rising"), ({"cosmics": -1.0}, "cosmics must not")):
        with pytest.raises(ConfigError, match=message):
            LArTPCOptions(**options)
    dataset = LArTPCConfig(events=1, cache=tmp_path).build("train")
    dataset.read(0)
    (path,) = tmp_path.glob("*/train/*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read as npz"):
        LArTPCConfig(events=1, cache=tmp_path).build("train").read(0)
