"""Turn an official checkpoint into a backbone folder: ``python tools/convert_checkpoint.py IN OUT``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from geossl.errors import CheckpointError, ConfigError
from geossl.methods import REFERENCES, load_reference
from geossl.methods.reference import find_system
from geossl.models import CroCoPair, save_backbone
from geossl.models.croco_files import save_decoder
from geossl.tasks import TASKS, PartSegmentationConfig, save_task


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="geossl convert",
        description="Read an official checkpoint, without executing anything it contains, and write its encoder as "
        "model.safetensors and config.json, which geossl.load and every geossl program read; of CroCo also its decoder, of a "
        "fine-tuned model also the whole of it as task.safetensors and task.json, for geossl.tasks.load_task and `geossl evaluate task`.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="the official file (.pth, .pt, .safetensors)")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write; made if missing")
    parser.add_argument(
        "--system",
        help=f"which system published it: {', '.join(REFERENCES)} (default: told by the names of the weights; a fine-tuned I2P-MAE "
        "has those of Point-M2AE, so say it)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="the published configuration file, for files trained with other than the released numbers (its `model` section is read)",
    )
    args = parser.parse_args(argv)
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise CheckpointError(f"{args.folder} exists and is not an empty folder; name a new one")
    published = read_published_config(args.config)
    system = args.system or find_system(args.source)
    model = load_reference(system, args.source, published)
    backbone = model.get_submodule("backbone")
    save_backbone(backbone, args.folder)
    count = sum(p.numel() for p in backbone.parameters())
    print(f"{args.source}: {type(model).__name__} of system {system}; its encoder ({count / 1e6:.1f} M parameters) is in {args.folder}")
    print(f"use it:  geossl.load({str(args.folder)!r})")
    pair = getattr(model, "pair", getattr(model, "body", None))  # of method croco, or of stereo and flow
    if isinstance(pair, CroCoPair):
        save_decoder(pair.decoder, args.folder)
        print(f"with its decoder:  geossl.models.load_pair_backbone({str(args.folder)!r})")
    task: Any = model.config
    if task.name in TASKS.names():
        count = len(task.part_counts) if isinstance(task, PartSegmentationConfig) else getattr(task, "classes", 0)  # stereo, flow: none
        save_task(model, numbered_classes(count), args.folder)
        print(f"with its head:  geossl.tasks.load_task({str(args.folder)!r})")
    return 0


def numbered_classes(count: int) -> list[str]:
    """What the classes of an official file are called, which does not name them."""
    return [f"class_{i}" for i in range(count)]


def read_published_config(path: Path | None) -> dict | None:
    """The ``model`` section of a published configuration file (or all of it, where it has none); None for no file."""
    if path is None:
        return None
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--config {path} must hold a mapping, got {type(config).__name__}")
    return config.get("model", config)
