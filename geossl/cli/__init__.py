"""The programs behind ``tools/*.py`` and the ``geossl`` console command.

Each program is a module of this package with a function ``main(argv) -> int`` that returns the exit code. It is imported only when it is
run, so ``geossl --help`` is quick. Errors geossl raises on purpose end as one line on stderr and exit code 2; ``GEOSSL_DEBUG=1`` shows
where they came from.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from geossl.errors import GeosslError, unknown_name

COMMANDS = {
    "doctor": "what is installed, built and found on this machine, and what to do about each thing missing",
    "pretrain": "self-supervised pretraining; without a configuration, of a small model on the embedded objects",
    "finetune": "supervised training of a head and a pretrained backbone",
    "extract": "features of files, folders or a data set, as .npz or .safetensors",
    "evaluate": "probes (kNN, linear, SVM) of a pretrained backbone, beside honest baselines",
    "convert": "turn an official checkpoint into model.safetensors and config.json",
    "fit-gaussians": "a scene of Gaussian splats from posed images, measured on held-out views",
    "prepare-data": "convert a folder of meshes or clouds to memory-mapped shards",
    "benchmark": "speed and memory of operators, training steps and data loading",
}


def run(command: str, argv: list[str]) -> int:
    """Run one program and return its exit code; 2 for an error raised on purpose, 130 when interrupted."""
    # torch's CPU threads spin while they wait, by default; beside any other work on the machine that costs several times the
    # training itself. Read when torch is loaded, which no program has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = os.environ.get("GEOSSL_DEBUG", "0") not in ("", "0")
    try:
        if command not in COMMANDS:
            raise unknown_name("command", command, COMMANDS)
        module = importlib.import_module(f"geossl.cli.{command.replace('-', '_')}")
        return int(module.main(argv))
    except GeosslError as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"geossl {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(f"geossl {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `geossl ... | head`: the reader has gone, and what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``geossl`` console command: ``geossl <command> [arguments]``."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-V", "--version"):
        from geossl import __version__

        print(f"geossl {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: geossl <command> [arguments]   (geossl <command> --help says more)\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))
        return 0 if argv else 2
    return run(argv[0], argv[1:])
