"""Every python block of README.md and docs/ runs.

The blocks of one file run in order in one namespace, each file in a fresh process and an empty
folder: what a reader who pastes them into an interpreter would have. By hand:

    python tests/test_documentation.py docs/backends.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[^\s`]*)")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line of code counts from 1 in the file."""

    language: str
    line: int
    code: str


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    blocks, lines, opening = [], text.splitlines(), None
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening, start = fence, number + 1
        elif fence and not fence["language"] and fence["ticks"].startswith(opening["ticks"]):
            code = textwrap.dedent("\n".join(lines[start - 1 : number - 1]))
            blocks.append(Block(opening["language"], start, code))
            opening = None
    if opening is not None:
        raise ValueError(f"the block that opens above line {start} never closes")
    return blocks


def python_blocks(path: Path) -> list[Block]:
    return [block for block in fenced_blocks(path.read_text("utf-8")) if block.language == "python"]


def documents() -> list[Path]:
    pages = (p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
    return [p for p in (ROOT / "README.md", *sorted(pages)) if p.exists()]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(path: Path) -> int:
    """Execute the blocks of one file; on an error say which line of the file raised it."""
    module = types.ModuleType("__main__")  # what the blocks define can be pickled
    sys.modules["__main__"] = module
    text = path.read_text("utf-8").splitlines()
    for block in python_blocks(path):
        try:
            # Blank lines in front make the line numbers of every traceback those of the file.
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            exec(code, module.__dict__)
        except Exception as error:
            if isinstance(error, SyntaxError) and error.filename == str(path):
                line = error.lineno or block.line
            else:
                frames = traceback.extract_tb(error.__traceback__)
                line = [f.lineno or 0 for f in frames if f.filename == str(path)][-1]
            traceback.print_exc()
            print(
                f"\n{path}:{line}: {type(error).__name__}: {error}\n    {text[line - 1].strip()}",
                file=sys.stderr,
            )
            return 1
    return 0


@pytest.mark.parametrize("path", [p for p in documents() if python_blocks(p)], ids=name)
def test_python_blocks_run(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.fail(f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}", pytrace=False)


@pytest.mark.parametrize("path", documents(), ids=name)
def test_links_within_the_repository_resolve(path: Path) -> None:
    prose = path.read_text("utf-8")
    for block in fenced_blocks(prose):
        prose = prose.replace(block.code, "")
    broken = [link for link in LINK.findall(prose) if not (path.parent / link).exists()]
    assert not broken, f"{name(path)} points at {broken}"


def test_the_line_of_an_error_is_reported(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\nx = 1\n```\n\n- in a list\n\n"
        "  ```python\n  x += 1\n  x.missing\n  ```\n",
        "utf-8",
    )
    done = subprocess.run(
        [sys.executable, __file__, str(page)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"{page}:11: AttributeError" in done.stderr
    assert done.stderr.rstrip().endswith("x.missing")


def test_blocks_are_found() -> None:
    text = "````text\n```python\nno\n```\n````\n```python\na\n```\n```console\n$ b\n```\n"
    assert [(b.language, b.line, b.code) for b in fenced_blocks(text)] == [
        ("text", 2, "```python\nno\n```"),
        ("python", 7, "a"),
        ("console", 10, "$ b"),
    ]


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]).resolve()))
