"""Print the commands that README.md tells a user to type: the ``bash`` blocks below one of its headings.

Usage: python3 .ci/readme_commands.py HEADING
"""

from __future__ import annotations

import sys
from pathlib import Path


def commands(text: str, heading: str) -> str:
    """Return the lines of the ``bash`` blocks in the section called ``heading``, sub-sections included."""
    found: list[str] = []
    inside, fence = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            fence = "" if fence else line
        elif fence:  # a "#" in here is a comment, no heading
            if inside and fence == "```bash":
                found.append(line)
        elif line.startswith(("# ", "## ")):
            inside = line.lstrip("# ").strip() == heading
    return "\n".join(found)


if __name__ == "__main__":
    found = commands(Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8"), sys.argv[1])
    if not found.strip():
        sys.exit(f"README.md has no bash block below the heading {sys.argv[1]!r}")
    print(found)
