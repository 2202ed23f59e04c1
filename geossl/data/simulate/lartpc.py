"""Particle events in liquid argon: tracks, showers, Michel electrons and delta rays, by simple physics in the units cm and MeV.

Nothing here replaces Geant4: mean energy losses are power laws, showers have bremsstrahlung and pair production alone. But events have
what a model must learn of real ones: Bragg peaks, scattered tracks, forked showers, short electrons at the end of muons and along them,
and low-energy deposits around. All particles of one kind are stepped together; an event takes some milliseconds.

Event ``number`` of ``seed`` is always the same one, whatever was simulated before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from geossl.config import require
from geossl.data.events import CLASSES, GRID, LED, VOXEL_MM, Event
from geossl.errors import DataError

PITCH = VOXEL_MM / 10  # cm
BOX = GRID * PITCH
STEP = 0.1  # cm
RADIATION_LENGTH = 14.0  # cm, of liquid argon
MINIMUM_LOSS = 2.1  # MeV/cm, of a minimum ionising particle
PHOTON, ELECTRON, MUON, PION, PROTON = range(5)
"""Particle numbers of PILArNet-M."""
MASS = np.array([0.0, 0.511, 105.66, 139.57, 938.27])  # MeV, by particle
_PRIMARIES = np.array([0.2, 0.15, 0.25, 0.2, 0.2])  # how often each leaves a vertex
_RANGE_CM = {MUON: (20.0, 120.0), PION: (20.0, 120.0), PROTON: (5.0, 25.0)}
_BRAGG = np.array([0.0, 0.0, 7.8, 8.0, 17.0])  # MeV/cm at 1 cm before the end: loss = A R^-0.42 (Bragg rise)
_BRAGG_POWER = 0.42
_SHOWER_MEV = (50.0, 250.0)
_DELTA_SPACING = 25.0  # cm of track for each delta ray
_DELTA_MEV = (2.0, 12.0)
_MICHEL_MEV = 52.8
_MICHEL_SHARE = 0.8
_PAIR_LENGTH = 18.0  # cm, 9/7 of the radiation length
_PAIR_MEV = 2.0  # less energetic photons do not convert, they leave blips
_SOFT_MEV = 0.5  # less energetic bremsstrahlung stays where it was made
_TRIES = 1000
SHOWER, TRACK, MICHEL, DELTA = (CLASSES.index(name) for name in ("shower", "track", "michel", "delta"))


@dataclass(kw_only=True)
class LArTPCOptions:
    """What is in an event."""

    vertices: tuple[int, int] = (1, 3)
    """Least and most interactions."""
    primaries: tuple[int, int] = (2, 5)
    """Least and most particles that leave an interaction."""
    cosmics: float = 0.0
    """Mean number of muons that cross the detector."""

    def __post_init__(self) -> None:
        for name in ("vertices", "primaries"):
            low, high = getattr(self, name)
            require(1 <= low <= high, name, "must be two rising numbers of at least 1", (low, high))
        require(self.cosmics >= 0, "cosmics", "must not be negative", self.cosmics)


def simulate_event(seed: int, number: int, options: LArTPCOptions | None = None, *, min_points: int = 1024, stream: int = 0) -> Event:
    """Simulate one event.

    Args:
        seed: Another seed gives other events, >= 0.
        number: Number of the event, >= 0.
        options: What is in it.
        min_points: Events of fewer voxels are drawn anew, as such are left out of training on PILArNet-M; 0 takes them as they come.
        stream: Independent row of events of a seed, for training and held-out ones.

    Returns:
        The event in the layout of version 2: low-energy deposits first, then one cluster for each fragment that is left with a voxel,
        voxels in rising order inside each. A voxel belongs to the fragment that has left most energy in it. The vertex in ``extra`` is in
        voxels.

    Raises:
        DataError: no event reaches ``min_points``.
    """
    options = options or LArTPCOptions()
    for attempt in range(_TRIES):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, number, attempt)))
        event = _Simulation(rng, options).run()
        if len(event) >= min_points:
            return event
    raise DataError(f"lartpc: none of {_TRIES} events had min_points={min_points} voxels; ask for fewer, or for more vertices or primaries")


@dataclass
class _Bunch:
    """Particles that are stepped together: where they start, which way, with how much (MeV; tracks: cm of range), whose they are."""

    position: np.ndarray  # [n, 3] cm
    direction: np.ndarray  # [n, 3] unit
    amount: np.ndarray  # [n]
    fragment: np.ndarray  # [n] row of _Simulation.fragments

    def __getitem__(self, rows: np.ndarray) -> _Bunch:
        return _Bunch(self.position[rows], self.direction[rows], self.amount[rows], self.fragment[rows])

    def __len__(self) -> int:
        return len(self.amount)


def _join(bunches: list[_Bunch]) -> _Bunch:
    return _Bunch(*(np.concatenate([getattr(b, name) for b in bunches]) for name in ("position", "direction", "amount", "fragment")))


@dataclass
class _Simulation:
    """One event while it is made."""

    rng: np.random.Generator
    options: LArTPCOptions
    fragments: list[tuple[int, int, int, int, float, np.ndarray]] = field(default_factory=list)
    """Group (-1: begins its own), interaction, class, particle, momentum, vertex of each; the first is that of low-energy deposits."""
    deposits: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """Positions ``[n, 3]``, energies ``[n]`` and fragments ``[n]``."""
    unconverted: set[int] = field(default_factory=set)
    """Fragments of the primary photons that have not converted yet."""

    def run(self) -> Event:
        """Simulate, and return the voxels."""
        self.new_fragment(-1, -1, LED, -1, -1.0, np.full(3, -1.0))
        bunches: list[list[_Bunch]] = [[] for _ in MASS]  # by particle
        count = int(self.rng.integers(*self.options.vertices, endpoint=True))
        for interaction in range(count):
            self.interaction(interaction, bunches)
        for cosmic in range(self.rng.poisson(self.options.cosmics)):
            bunches[MUON].append(self.cosmic(count + cosmic))
        for particle in (MUON, PION, PROTON):
            if bunches[particle]:
                bunches[ELECTRON] += self.track(_join(bunches[particle]), particle)
        self.shower(bunches[ELECTRON], bunches[PHOTON])
        return self.voxelise()

    def new_fragment(self, group: int, interaction: int, semantic: int, particle: int, momentum: float, vertex: np.ndarray) -> int:
        """Note a fragment and return its row; ``group`` -1 begins a group of its own."""
        self.fragments.append((group, interaction, semantic, particle, momentum, vertex))
        return len(self.fragments) - 1

    def interaction(self, number: int, bunches: list[list[_Bunch]]) -> None:
        """Add the particles that leave a vertex to those of their kind, and low-energy deposits around it."""
        rng = self.rng
        vertex = rng.uniform(0.2 * BOX, 0.8 * BOX, 3)
        kinds = rng.choice(len(MASS), int(rng.integers(*self.options.primaries, endpoint=True)), p=_PRIMARIES)
        for particle, direction in zip(kinds.tolist(), _isotropic(rng, len(kinds)), strict=True):
            amount = rng.uniform(*_RANGE_CM.get(particle, _SHOWER_MEV))
            energy = float(_kinetic(np.array(amount), particle)) if particle in _RANGE_CM else amount
            semantic = TRACK if particle in _RANGE_CM else SHOWER
            row = self.new_fragment(-1, number, semantic, particle, _momentum(energy, particle), vertex)
            bunches[particle].append(_Bunch(vertex[None], direction[None], np.array([amount]), np.array([row])))
            if particle == PHOTON:
                self.unconverted.add(row)
        spread = rng.poisson(15)
        self.deposits.append((vertex + rng.normal(0, 30, (spread, 3)), rng.exponential(0.4, spread), np.zeros(spread, dtype=np.int64)))

    def cosmic(self, interaction: int) -> _Bunch:
        """Return a muon that comes in through a random place of the top (largest y) and has a range far beyond the detector."""
        start = np.array([self.rng.uniform(0, BOX), BOX, self.rng.uniform(0, BOX)])
        cosine = np.sqrt(self.rng.uniform(0.05, 1))  # intensity falls with the squared cosine from the vertical
        azimuth = self.rng.uniform(0, 2 * np.pi)
        sine = np.sqrt(1 - cosine**2)
        reach = np.array([self.rng.uniform(500, 2000)])
        momentum = _momentum(float(_kinetic(reach, MUON)[0]), MUON)
        row = self.new_fragment(-1, interaction, TRACK, MUON, momentum, start)
        return _Bunch(start[None], np.array([[sine * np.cos(azimuth), -cosine, sine * np.sin(azimuth)]]), reach, np.array([row]))

    def track(self, bunch: _Bunch, particle: int) -> list[_Bunch]:
        """Deposit the energy of muons, pions or protons along their ways; return the electrons they set free: deltas and Michels."""
        rng = self.rng
        across = np.minimum(bunch.amount, np.sqrt(3) * BOX)  # of a range far beyond the detector, only what can be inside
        steps = np.ceil(across / STEP).astype(np.int64)
        owner, step = _spread(steps)
        residual = np.maximum(bunch.amount[owner] - (step + 0.5) * STEP, 0.5 * STEP)
        kinetic = _kinetic(residual, particle)
        momentum_beta = kinetic * (kinetic + 2 * MASS[particle]) / (kinetic + MASS[particle])
        middle, direction, end = self.walk(bunch, owner, step, _highland(momentum_beta))
        loss = _fluctuate(rng, np.maximum(MINIMUM_LOSS, _BRAGG[particle] * residual**-_BRAGG_POWER))
        self.deposit(middle, direction, loss, bunch.fragment[owner])
        if particle == PROTON:
            return []
        born = np.flatnonzero((rng.random(len(owner)) < STEP / _DELTA_SPACING) & _inside(middle))
        energy = rng.uniform(*_DELTA_MEV, len(born))
        turned = _turn(direction[born], np.arccos(rng.uniform(0.0, 0.8, len(born))), rng.uniform(0, 2 * np.pi, len(born)))
        made = [self.daughters(middle[born], turned, energy, bunch.fragment[owner[born]], DELTA)]
        if particle == MUON:
            stopped = np.flatnonzero((rng.random(len(bunch)) < _MICHEL_SHARE) & _inside(end) & (across == bunch.amount))
            energy = _MICHEL_MEV * _michel_fraction(rng, len(stopped))
            made.append(self.daughters(end[stopped], _isotropic(rng, len(stopped)), energy, bunch.fragment[stopped], MICHEL))
        return made

    def daughters(self, position: np.ndarray, direction: np.ndarray, energy: np.ndarray, parent: np.ndarray, semantic: int) -> _Bunch:
        """Return electrons with a fragment each, of the interaction of their parents."""
        rows = [
            self.new_fragment(-1, self.fragments[p][1], semantic, ELECTRON, _momentum(e, ELECTRON), v)
            for p, e, v in zip(parent.tolist(), energy.tolist(), position, strict=True)
        ]
        return _Bunch(position, direction, energy, np.array(rows, dtype=np.int64))

    def shower(self, electrons: list[_Bunch], photons: list[_Bunch]) -> None:
        """Step electrons and photons, and those they make, until none is left."""
        while electrons or photons:
            made = self.convert(_join(photons)) if photons else None
            if made is not None and len(made):
                electrons.append(made)
            photons = []
            if electrons:
                radiated = self.electrons(_join(electrons))
                photons = [radiated] if len(radiated) else []
            electrons = []

    def electrons(self, bunch: _Bunch) -> _Bunch:
        """Deposit the energy of electrons along their ways and return the photons they radiate."""
        rng = self.rng
        bunch = bunch[np.flatnonzero(bunch.amount > 0)]
        owner, step = _spread(np.ceil(bunch.amount / (0.6 * MINIMUM_LOSS * STEP)).astype(np.int64))  # no step loses less than that
        loss = np.maximum(_fluctuate(rng, np.full(len(owner), MINIMUM_LOSS)), 0.6 * MINIMUM_LOSS * STEP)
        # Three photons of a mean share of a third for each radiation length: what is lost is then the energy, as it should be.
        radiating = rng.random(len(owner)) < 3 * STEP / RADIATION_LENGTH
        share = np.where(radiating, np.minimum(rng.random(len(owner)) ** 2, 0.99), 0.0)
        # After step k of E: (E - loss) (1 - share), so E_k = P_k (E_0 - sum loss_j / P_(j - 1)) with P the product of (1 - share).
        # Behind a millionth nothing is left of any electron; the bound keeps the sums exact.
        after = np.maximum(_running_sum(np.log1p(-share), step), np.log(1e-6))
        before = np.exp(after - np.maximum(np.log1p(-share), np.log(1e-6)))
        spent = _running_sum(loss / before, step)
        left = before * np.maximum(bunch.amount[owner] - (spent - loss / before), 0.0)  # at the start of the step
        alive = left > 0
        owner, step, loss, share, left = owner[alive], step[alive], np.minimum(loss, left)[alive], share[alive], left[alive]
        photon = share * (left - loss)
        middle, direction, _ = self.walk(bunch, owner, step, _highland(left * (left + 2 * MASS[ELECTRON]) / (left + MASS[ELECTRON])))
        hard = photon > _SOFT_MEV
        self.deposit(middle, direction, loss + np.where(hard, 0.0, photon), bunch.fragment[owner])
        return _Bunch(middle[hard], direction[hard], photon[hard], bunch.fragment[owner[hard]])

    def convert(self, bunch: _Bunch) -> _Bunch:
        """Let photons fly and convert to pairs, in a fragment of their own; those below 2 MeV leave low-energy deposits."""
        rng = self.rng
        # Compton scattering takes over below 30 MeV, and photons of a few MeV fly farthest.
        flight = rng.exponential(_PAIR_LENGTH * np.clip((30.0 / np.maximum(bunch.amount, 1e-3)) ** 0.3, 1.0, 2.0))
        flight = np.where(bunch.amount < _PAIR_MEV, rng.exponential(RADIATION_LENGTH, len(bunch)), flight)
        place = bunch.position + flight[:, None] * bunch.direction
        soft = np.flatnonzero(bunch.amount < _PAIR_MEV)
        self.blips(place[soft], bunch.direction[soft], bunch.amount[soft])
        rows = np.flatnonzero((bunch.amount >= _PAIR_MEV) & _inside(place))
        found = zip(bunch.fragment[rows].tolist(), bunch.amount[rows].tolist(), place[rows], strict=True)
        fragment = np.array([self.conversion(*values) for values in found], dtype=np.int64)
        energy = bunch.amount[rows] - 2 * MASS[ELECTRON]
        part = rng.random(len(rows))
        angle = MASS[ELECTRON] / np.maximum(bunch.amount[rows], 1.0)  # between a lepton of the pair and the photon
        azimuth = rng.uniform(0, 2 * np.pi, len(rows))
        pair = [
            _Bunch(place[rows], _turn(bunch.direction[rows], angle, azimuth + side * np.pi), energy * share, fragment)
            for side, share in ((0, part), (1, 1 - part))
        ]
        return _join(pair)

    def conversion(self, parent: int, energy: float, place: np.ndarray) -> int:
        """Return the fragment of a photon of ``energy`` that came from the fragment ``parent`` and converts at ``place``."""
        if parent in self.unconverted:  # it is that photon
            self.unconverted.remove(parent)
            return parent
        group, interaction, semantic, particle, _, _ = self.fragments[parent]
        if semantic != SHOWER:  # of a Michel or delta electron: a small shower of its own
            return self.new_fragment(-1, interaction, SHOWER, PHOTON, energy / 1000, place)
        return self.new_fragment(parent if group < 0 else group, interaction, SHOWER, particle, energy / 1000, place)

    def blips(self, position: np.ndarray, direction: np.ndarray, energy: np.ndarray) -> None:
        """Deposit the energy of soft photons in Compton electrons too short to be seen as such."""
        rng = self.rng
        while len(energy):
            share = np.where(energy < 0.15, 1.0, rng.uniform(0.1, 0.9, len(energy)))
            self.deposits.append((position, energy * share, np.zeros(len(energy), dtype=np.int64)))
            rows = np.flatnonzero(share < 1)
            energy = (energy * (1 - share))[rows]
            direction = _turn(direction[rows], np.arccos(rng.uniform(-0.5, 1, len(rows))), rng.uniform(0, 2 * np.pi, len(rows)))
            position = position[rows] + direction * rng.exponential(0.6 * RADIATION_LENGTH, (len(rows), 1))

    def walk(self, bunch: _Bunch, owner: np.ndarray, step: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where each step has its middle and which way it goes, ``[n, 3]``, and where each particle ends; ``angle`` scatters it."""
        x, y = self.rng.normal(size=(2, len(owner))) * angle
        direction = _directions(bunch.direction, owner, step, x, y)
        way = STEP * np.stack([_running_sum(direction[:, axis], step) for axis in range(3)], 1)
        after = bunch.position[owner] + way
        last = np.flatnonzero(np.append(step[1:] == 0, True)) if len(step) else np.zeros(0, dtype=np.int64)
        return after - 0.5 * STEP * direction, direction, after[last]

    def deposit(self, middle: np.ndarray, direction: np.ndarray, energy: np.ndarray, fragment: np.ndarray) -> None:
        """Note the energies of steps, shared out among the voxels that a step crosses by its length in each."""
        start, way = (middle - 0.5 * STEP * direction) / PITCH, STEP / PITCH * direction
        before, after = np.floor(start), np.floor(start + way)
        with np.errstate(divide="ignore", invalid="ignore"):  # along axes on which nothing is crossed
            cut = np.where(before == after, 1.0, (np.maximum(before, after) - start) / way)
        ends = np.sort(np.column_stack([np.zeros(len(cut)), cut, np.ones(len(cut))]), axis=1)
        length = np.diff(ends, axis=1)
        step, part = np.nonzero(length > 0)
        place = start[step] + (ends[step, part] + 0.5 * length[step, part])[:, None] * way[step]
        self.deposits.append((place * PITCH, energy[step] * length[step, part], fragment[step]))

    def voxelise(self) -> Event:
        """Sum the deposits in voxels, each of the fragment that left most in it, and order them by fragment."""
        position, energy, fragment = (np.concatenate(parts) for parts in zip(*self.deposits, strict=True))
        kept = _inside(position)
        cell = np.minimum((position[kept] / PITCH).astype(np.int64), GRID - 1)
        flat = (cell[:, 0] * GRID + cell[:, 1]) * GRID + cell[:, 2]
        shared, inverse = np.unique(flat * len(self.fragments) + fragment[kept], return_inverse=True)
        energies = np.bincount(inverse, energy[kept], len(shared))
        voxel, owner = np.divmod(shared, len(self.fragments))
        first = np.flatnonzero(np.diff(voxel, prepend=-1))
        total = np.add.reduceat(energies, first) if len(first) else energies
        # The first row of a voxel in the order of falling energy is that of its largest share.
        order = np.lexsort((-energies, voxel))[first]
        voxel, owner = voxel[first], owner[order]
        order = np.argsort(owner, kind="stable")
        voxel, owner, total = voxel[order], owner[order], total[order]
        sizes = np.bincount(owner, minlength=len(self.fragments))
        rows = [row for row in range(len(sizes)) if sizes[row] or row == 0]
        groups: dict[int, int] = {}
        clusters, extra = [], []
        for number, row in enumerate(rows, start=-1):  # the low-energy deposits are no fragment
            group, interaction, semantic, particle, momentum, vertex = self.fragments[row]
            group = groups.setdefault(row if group < 0 else group, number)  # named for the first fragment that is left of it
            clusters.append((sizes[row], number, group, interaction, semantic, particle))
            extra.append((MASS[particle] if particle >= 0 else -1.0, momentum, *(vertex / PITCH if row else vertex)))
        place = np.stack([voxel // GRID**2, voxel // GRID % GRID, voxel % GRID], 1).astype(np.int16)
        return Event(place, total.astype(np.float32), np.array(clusters, dtype=np.int64), np.array(extra, dtype=np.float32))


def _inside(position: np.ndarray) -> np.ndarray:
    return np.asarray(((position >= 0) & (position < BOX)).all(1))


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for ``counts[i]`` rows of every particle i one after the other, its number and the step within it."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _running_sum(values: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return the sum up to and with each row, begun anew wherever ``step`` is 0."""
    total = np.cumsum(values)
    return total - (total - values)[np.arange(len(step)) - step]


def _kinetic(residual: np.ndarray, particle: int) -> np.ndarray:
    """Return the kinetic energy that a residual range leaves: the integral of the mean loss."""
    power, slope = _BRAGG_POWER, _BRAGG[particle]
    knee = (slope / MINIMUM_LOSS) ** (1 / power)  # where the rise begins
    rise = slope / (1 - power) * np.minimum(residual, knee) ** (1 - power)
    return rise + MINIMUM_LOSS * np.maximum(residual - knee, 0.0)


def _momentum(energy: float, particle: int) -> float:
    """Return the momentum in GeV of a particle of kinetic ``energy`` in MeV."""
    return float(np.sqrt(energy * (energy + 2 * MASS[particle]))) / 1000


def _highland(momentum_beta: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the angle by which a step scatters, projected on a plane (Highland)."""
    return 13.6 / np.maximum(momentum_beta, 1e-3) * np.sqrt(STEP / RADIATION_LENGTH)


def _fluctuate(rng: np.random.Generator, mean: np.ndarray) -> np.ndarray:
    """Return the loss of each step with Landau-like fluctuations (a Moyal variate), MeV; ``mean`` in MeV/cm."""
    moyal = -np.log(np.maximum(rng.normal(size=len(mean)) ** 2, 1e-12))
    return np.maximum(0.82 * mean * STEP + 0.012 * mean / MINIMUM_LOSS * np.sqrt(STEP / 0.1) * moyal, 0.02)


def _michel_fraction(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw from the spectrum x^2 (3 - 2x) on 0..1."""
    draws = rng.random((count, 64, 2))
    x = np.cbrt(draws[..., 0])  # of density 3 x^2; taken with probability 1 - 2x/3, which is half the time
    taken = draws[..., 1] < 1 - 2 * x / 3
    return x[np.arange(count), taken.argmax(1)]


def _isotropic(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _turn(direction: np.ndarray, angle: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    """Return directions at ``angle`` to the given ones, at ``azimuth`` around them."""
    u, v = _across(direction)
    side = np.cos(azimuth)[:, None] * u + np.sin(azimuth)[:, None] * v
    return np.cos(angle)[:, None] * direction + np.sin(angle)[:, None] * side


def _directions(start: np.ndarray, owner: np.ndarray, step: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which way every step goes ``[n, 3]``: the particle's ``start [p, 3]``, turned by the angles of all its steps so far.

    Each step turns the particle's own frame about the two axes across its way by ``x`` and ``y``, as one rotation. Products of rotations
    are associative, so all steps are chained by doubling: after pass k a row holds the product of the last 2^k. A rotation is a unit
    quaternion a + b j of complex a and b, and the way is the axis i.
    """
    angle = np.hypot(x, y)
    half = 0.5 * np.sinc(angle / (2 * np.pi))  # sin(angle / 2) / angle
    a = np.cos(angle / 2) + 0j
    b = half * (x + 1j * y)
    for reach in (1 << k for k in range(int(step.max(initial=0)).bit_length())):
        rows = np.flatnonzero(step >= reach)
        a0, b0, a1, b1 = a[rows - reach], b[rows - reach], a[rows], b[rows]
        a[rows], b[rows] = a0 * a1 - b0 * b1.conj(), a0 * b1 + b0 * a1.conj()
    across = -2j * a * b  # q i q* = (|a|^2 - |b|^2) i - 2 i a b j
    along = np.abs(a) ** 2 - np.abs(b) ** 2
    u, v = _across(start)
    return along[:, None] * start[owner] + across.real[:, None] * u[owner] + across.imag[:, None] * v[owner]


def _across(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two unit vectors ``[n, 3]`` that make a right-handed frame with each direction."""
    u = np.cross(direction, np.eye(3)[np.abs(direction).argmin(1)])
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return u, np.cross(direction, u)
