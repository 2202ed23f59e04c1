from __future__ import annotations

import logging
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from geossl.config import (
    field_docs,
    flatten,
    from_dict,
    load_config,
    read_yaml,
    registry_field,
    registry_fields,
    require,
    split_arguments,
    to_dict,
    to_yaml,
)
from geossl.errors import ConfigError, UnknownNameError
from geossl.registry import Registry

SHAPES: Registry[Any] = Registry("shape")


@dataclass(frozen=True, kw_only=True)
class Ball:
    name: str = "ball"
    """Registered shape."""
    radius: float = 1.0
    """Radius in metres, > 0."""

    def __post_init__(self) -> None:
        require(self.radius > 0, "radius", "must be > 0", self.radius)


@dataclass(frozen=True, kw_only=True)
class Box:
    name: str = "box"
    """Registered shape."""
    size: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Edges in metres."""
    labels: tuple[str, ...] = ()
    """Names of the faces."""


@SHAPES.register
def ball() -> Ball:
    return Ball()


@SHAPES.register
def big_ball() -> Ball:
    return Ball(name="big_ball", radius=10.0)


@SHAPES.register
def box() -> Box:
    return Box()


@dataclass(kw_only=True)
class Optim:
    lr: float = 1e-3
    """Peak learning rate, > 0."""
    kind: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    clip: float | None = None
    """Largest gradient norm; null leaves gradients alone."""
    warmup: int = 10
    """Steps of warm-up."""
    nesterov: bool = False
    """A switch."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", "must be > 0", self.lr)
        require(self.warmup >= 0, "warmup", "must not be negative", self.warmup)


@dataclass(kw_only=True)
class Program:
    """What the program does."""

    shape: Any = registry_field(SHAPES, default="ball")  # noqa: RUF009
    """What is trained."""
    extra: Any = registry_field(SHAPES, default=None)  # noqa: RUF009
    """Perhaps a second shape."""
    more: tuple[Any, ...] = registry_fields(SHAPES)
    """Any number of shapes."""
    optim: Optim = field(default_factory=Optim)
    """How it is trained."""
    out: Path = Path("runs/x")
    """Where results go."""
    note: str = ""
    """Free text."""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_file_and_flags_in_rising_order(tmp_path: Path) -> None:
    path = write(tmp_path, "shape: {name: big_ball}\noptim: {lr: 1e-2, warmup: 1e4}\nnote: off\n")
    config = load_config(Program, path, ["--optim.lr", "0.5", "--out", "runs/y", "--optim.nesterov"])
    assert config == Program(
        shape=Ball(name="big_ball", radius=10.0), optim=Optim(lr=0.5, warmup=10000, nesterov=True), out=Path("runs/y"), note="off"
    )
    assert load_config(Program, None) == Program()


def test_choice_takes_the_defaults_of_the_variant(tmp_path: Path) -> None:
    assert from_dict(Program, {"shape": "big_ball"}).shape.radius == 10.0
    assert from_dict(Program, {"shape": {"name": "big_ball", "radius": 3}}).shape == Ball(name="big_ball", radius=3.0)
    flags = ["--shape.name=box", "--shape.size", "1", "2", "3", "--shape.labels", "a", "b"]
    assert load_config(Program, None, flags).shape == Box(size=(1.0, 2.0, 3.0), labels=("a", "b"))


def test_choice_that_need_not_be_made(tmp_path: Path) -> None:
    assert Program().extra is None
    assert from_dict(Program, {"extra": None}).extra is None
    assert from_dict(Program, {"extra": {"name": "ball", "radius": 2}}).extra == Ball(radius=2.0)
    assert load_config(Program, None, ["--extra.name", "ball", "--extra.radius", "4"]).extra == Ball(radius=4.0)
    path = write(tmp_path, "extra: {name: box}")
    assert load_config(Program, path, ["--note", "x"]).extra == Box()
    with pytest.raises(UnknownNameError, match=r"extra\.name: unknown shape 'bal'"):
        load_config(Program, None, ["--extra.name", "bal"])
    with pytest.raises(UnknownNameError, match=r"unknown flag '--extra\.radius'"):
        load_config(Program, None, ["--extra.radius", "4"])
    with pytest.raises(ConfigError, match=r"extra\.name must be the name of a shape, got None"):
        from_dict(Program, {"extra": {"radius": 4}})


def test_lists_of_choices(tmp_path: Path) -> None:
    path = write(tmp_path, "more: [ball, {name: big_ball, radius: 3}, {name: box, labels: [a]}]")
    config = load_config(Program, path, ["--note", "x"])
    assert config.more == (Ball(), Ball(name="big_ball", radius=3.0), Box(labels=("a",)))
    for data, words in [
        ({"more": "ball"}, "more must be a list, each entry a shape name or a mapping with the key 'name', got 'ball'"),
        ({"more": [{}]}, r"more\[0\] must be a shape name or a mapping"),
        ({"more": ["ball", {"name": "bal"}]}, r"more\[1\]\.name: unknown shape 'bal'"),
        ({"more": [{"name": "ball", "radius": -1}]}, r"more\[0\]\.radius must be > 0, got -1"),
        ({"more": [{"name": "ball", "radios": 1}]}, r"unknown key 'more\[0\]\.radios'; did you mean 'more\[0\]\.radius'"),
        ({"more": [{"radius": 1}]}, r"more\[0\]\.name must be the name of a shape, got None"),
    ]:
        with pytest.raises((ConfigError, UnknownNameError), match=words):
            from_dict(Program, data)
    with pytest.raises(UnknownNameError, match="unknown flag '--more'"):
        load_config(Program, None, ["--more", "ball"])


def test_choice_by_flag_leaves_the_keys_of_the_other_variant_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "shape: {name: ball, radius: 5}\n")
    with caplog.at_level(logging.WARNING, "geossl"):
        assert load_config(Program, path, ["--shape.name", "big_ball"]).shape.radius == 10.0
    assert "shape.radius" in caplog.text
    assert "ball" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "geossl"):
        assert load_config(Program, path, ["--shape.name", "ball"]).shape.radius == 5.0
    assert not caplog.text


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("optim: {lrr: 1}", UnknownNameError, ["config.yaml", "'optim.lrr'", "did you mean 'optim.lr'"]),
        ("lr: 1", UnknownNameError, ["'lr'", "did you mean 'optim.lr'"]),
        ("optim: {note: 1}", UnknownNameError, ["'optim.note'", "did you mean 'note'"]),
        ("shape: {name: bal}", UnknownNameError, ["shape.name", "'bal'", "did you mean 'ball'"]),
        ("shape: {name: box, radius: 2}", UnknownNameError, ["'shape.radius'", "name, size, labels"]),
        ("optim: {lr: fast}", ConfigError, ["optim.lr", "a number", "'fast'"]),
        ("optim: {lr: true}", ConfigError, ["optim.lr", "a number", "True"]),
        ("optim: {warmup: 1.5}", ConfigError, ["optim.warmup", "an integer", "1.5"]),
        ("optim: {nesterov: 1}", ConfigError, ["optim.nesterov", "true or false"]),
        ("optim: {kind: adam}", ConfigError, ["optim.kind", "adamw, sgd", "'adam'", "did you mean 'adamw'"]),
        ("optim: {clip: much}", ConfigError, ["optim.clip", "a number or null"]),
        ("optim: {lr: -1}", ConfigError, ["optim.lr must be > 0, got -1.0"]),
        ("optim: [1]", ConfigError, ["optim must be a mapping"]),
        ("shape: {name: ball, radius: 0}", ConfigError, ["shape.radius must be > 0"]),
        ("shape: [1]", ConfigError, ["shape must be a shape name or a mapping"]),
        ("shape: {name: 3}", ConfigError, ["shape.name must be the name of a shape"]),
        ("shape: {name: box, size: [1, 2]}", ConfigError, ["shape.size must be a list of 3 values"]),
        ("shape: {name: box, size: [1, 2, x]}", ConfigError, ["shape.size[2] must be a number"]),
        ("shape: {name: box, labels: a}", ConfigError, ["shape.labels must be a list"]),
        ("note: 3", ConfigError, ["note must be a text, got 3"]),
        ("note: a\nnote: b", ConfigError, ["not valid YAML", "'note' appears twice"]),
        ("optim: {lr: 1", ConfigError, ["not valid YAML", "config.yaml"]),
        ("- 1", ConfigError, ["must hold a mapping"]),
    ],
)
def test_bad_file(tmp_path: Path, text: str, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        load_config(Program, write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.lrr", "1"], ["unknown flag '--optim.lrr'", "did you mean '--optim.lr'"]),
        (["--lr=1"], ["unknown flag '--lr'", "did you mean '--optim.lr'"]),
        (["--shape.size", "1"], ["unknown flag '--shape.size'", "name, radius"]),
        (["--shape", "box"], ["unknown flag '--shape'", "'--shape.name'"]),
        (["--shape.name", "bxo"], ["shape.name", "unknown shape 'bxo'", "'box'"]),
        (["--optim.lr", "fast"], ["--optim.lr", "'fast'"]),
        (["--optim.lr"], ["--optim.lr"]),
        (["--optim.kind", "adam"], ["--optim.kind", "adamw", "sgd"]),
        (["--optim.lr", "-1"], ["optim.lr must be > 0, got -1.0"]),
        (["--shape.radius", "0"], ["shape.radius must be > 0, got 0.0"]),
        (["--optim.nesterov", "maybe"], ["'maybe'", "switches take no value"]),
        (["--note", "a", "other.yaml"], ["'other.yaml'", "before all flags"]),
    ],
)
def test_bad_flags(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, UnknownNameError)) as caught:
        load_config(Program, None, flags)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*absent\.yaml"):
        load_config(Program, tmp_path / "absent.yaml")


def test_help_lists_every_field_with_doc_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_config(Program, None, ["--shape.name", "box", "--help"], prog="program")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for key in flatten(from_dict(Program, {"shape": "box"})):
        assert (f"--{key}" in text) == (key != "more")  # flags cannot set a list of choices
    for doc in (
        "Edges in metres.",
        "Peak learning rate, > 0. (default: 0.001)",
        "What the program does.",
        "How it is trained.",
        "One of: ball, big_ball, box.",
    ):
        assert doc in text


def test_field_docs_follow_inheritance() -> None:
    @dataclass
    class Derived(Optim):
        momentum: float = 0.9
        """Of the
        update."""

    docs = field_docs(Derived)
    assert docs["momentum"] == "Of the update."
    assert docs["lr"] == "Peak learning rate, > 0."


def test_split_arguments() -> None:
    assert split_arguments(["a.yaml", "--x", "1"]) == ("a.yaml", ["--x", "1"])
    assert split_arguments(["--x", "1"]) == (None, ["--x", "1"])
    assert split_arguments([]) == (None, [])


def test_yaml_reads_numbers_as_people_mean_them(tmp_path: Path) -> None:
    data = read_yaml(write(tmp_path, "{a: 1e-3, b: 5E4, c: -2, d: on, e: 007, f: .5, g: .inf, h: ~, i: 2026-01-02, j: true}"))
    expected = {"a": 1e-3, "b": 5e4, "c": -2, "d": "on", "e": 7, "f": 0.5, "g": float("inf"), "h": None, "i": "2026-01-02", "j": True}
    assert data == expected
    assert {key: type(value) for key, value in data.items()} == {key: type(value) for key, value in expected.items()}


texts = st.text(st.sampled_from(string.printable + "é中\u2028"), max_size=20)
finite = st.floats(allow_nan=False)
shapes = st.one_of(
    st.builds(Ball, name=st.sampled_from(["ball", "big_ball"]), radius=st.floats(min_value=1e-30, allow_nan=False)),
    st.builds(Box, name=st.just("box"), size=st.tuples(finite, finite, finite), labels=st.lists(texts, max_size=3).map(tuple)),
)
optims = st.builds(
    Optim,
    lr=st.floats(min_value=1e-300, allow_nan=False),
    kind=st.sampled_from(["adamw", "sgd"]),
    clip=st.none() | finite,
    warmup=st.integers(min_value=0),
    nesterov=st.booleans(),
)
programs = st.builds(
    Program,
    shape=shapes,
    extra=st.none() | shapes,
    more=st.lists(shapes, max_size=3).map(tuple),
    optim=optims,
    out=texts.filter(lambda t: t.strip() and "\0" not in t).map(Path),
    note=texts,
)


@settings(deadline=None, max_examples=60)
@given(programs)
def test_round_trip_through_yaml(config: Program) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "")
        path.write_text(to_yaml(config), encoding="utf-8", newline="")
        again = load_config(Program, path)
    assert again == config
    assert to_dict(again) == to_dict(config)


@settings(deadline=None, max_examples=60)
@given(texts)
def test_dumped_text_is_plain_yaml(note: str) -> None:
    """Any other YAML 1.1 reader sees a text as well, save where the two versions disagree about plain scalars."""
    loaded = yaml.safe_load(to_yaml(Program(note=note)))["note"]
    assert loaded == note or not isinstance(loaded, str)
