"""The small programs that continuous integration relies on."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
LOG = """
  ptxas info    : Compiling entry function '_Z10fps_kernelPKfi' for 'sm_80'
  ptxas info    : Function properties for _Z10fps_kernelPKfi
      8 bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 32 registers, used 1 barriers, 128 bytes smem
  ptxas info    : Compiling entry function '_Z10fps_kernelPKfi' for 'sm_90'
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 40 registers, used 0 barriers
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("stores", "code"), [(0, 0), (16, 1)])
def test_register_report(tmp_path, capsys, stores, code):
    (tmp_path / "log").write_text(LOG.format(stores=stores))
    assert load("ptxas_report").main(str(tmp_path / "log")) == code
    text = capsys.readouterr().out
    assert "sm_80:32 sm_90:40" in text
    assert " 128 " in text
    assert ("spill registers to local memory: _Z10fps_kernelPKfi (sm_80, 16 bytes)" in text) == bool(stores)


def test_log_without_a_report_is_an_error(tmp_path):
    (tmp_path / "log").write_text("nothing here\n")
    assert load("ptxas_report").main(str(tmp_path / "log")) == 1


README = """# geossl
## Install
```bash
# a comment, not a heading
a
```
or
```python
not this
```
### More
```bash
b
```
## Quickstart
```bash
c
```
"""


def test_commands_are_read_from_the_readme():
    commands = load("readme_commands").commands
    assert commands(README, "Install") == "# a comment, not a heading\na\nb"
    assert commands(README, "Quickstart") == "c"
    assert commands(README, "Nowhere") == ""


@pytest.mark.parametrize("script", ["tools/quickstart.sh", "tools/test.sh", "tools/environment.sh", ".ci/run"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
