"""The README's Python runs, and its commands name programs, files and flags that exist. CI runs the commands themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_runs():
    code = "\n".join(blocks("python"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["vectors"].feats) == 2
    assert len(names["per_point"].feats) == 2048
    assert len(names["blocks"]) == 3
    assert names["centers"].shape == (2, 64)
    assert names["image"].shape == (1, 64, 64, 3)
    assert float(names["alpha"].max()) > 0


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:tools|configs|docs|geossl)/[\w./-]+\.(?:py|sh|yaml|md|tsv)", README))))
def test_named_files_exist(path):
    assert (ROOT / path).is_file()


def test_every_command_line_section_is_run_by_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    for heading, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL):
        if "```bash" in body:
            assert f'readme_commands.py "{heading}"' in ci or f"readme_commands.py {heading} " in ci, heading
