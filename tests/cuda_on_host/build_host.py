"""Compiles every kernel file of ``cuda_ext/cuda`` with an ordinary C++ compiler, to run on the CPU.

    python tests/cuda_on_host/build_host.py [plain|asan|tsan]     # prints the path of the library

Builds are kept under ``build/host`` of the source tree and made again when a source or a flag has changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "g++")

MODES = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}


def compiler_found() -> bool:
    return shutil.which(CXX) is not None


def compile_sources(name: str, sources: list[Path], mode: str, *extra: str) -> Path:
    """Compile ``sources`` into one file ``build/host/<name>-<mode>-<hash>`` and return its path."""
    flags = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *MODES[mode], *extra]
    includes = [f"-I{HERE / 'host'}", f"-I{ROOT / 'cuda_ext' / 'include'}", f"-I{ROOT / 'cuda_ext' / 'cuda'}"]
    state = hashlib.sha256(" ".join([CXX, *flags]).encode())
    for path in sorted([*sources, *(ROOT / "cuda_ext").rglob("*.*h"), *HERE.rglob("*.*h")]):
        state.update(path.read_bytes())
    target = ROOT / "build" / "host" / f"{name}-{mode}-{state.hexdigest()[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compiled(source: Path) -> Path:  # one by one, as nvcc compiles them: names of different files must not meet
            object_file = Path(folder) / f"{source.stem}{source.suffix}.o"
            language = ["-x", "c++"] if source.suffix == ".cu" else []
            subprocess.run([CXX, *flags, *includes, "-fPIC", "-c", *language, str(source), "-o", str(object_file)], check=True)
            return object_file

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        built = Path(folder) / "built"
        subprocess.run([CXX, *flags, *map(str, objects), "-lpthread", "-o", str(built)], check=True)
        os.replace(built, target)  # two test processes may build at once; either result will do
    return target


def host_library(mode: str = "plain") -> Path:
    """Return the library with all kernels; it stands in for ``libgeossl_cuda``."""
    return compile_sources("libgeossl_cuda_host.so", sorted((ROOT / "cuda_ext" / "cuda").glob("*.cu")), mode, "-shared")


if __name__ == "__main__":
    print(host_library(*sys.argv[1:]))
