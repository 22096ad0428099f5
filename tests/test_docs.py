"""The documentation keeps up with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli import main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_reference_is_what_help_prints() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_reference.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_a_page_and_is_in_the_readme(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# psp {name}\n")
    assert f"(docs/{name}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]*)", page.read_text(encoding="utf-8")):
        if target and not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_named_in_an_example_exists(page: Path) -> None:
    for example in re.findall(r"^psp [a-z-]+ .*$", page.read_text(encoding="utf-8"), re.MULTILINE):
        command = main.commands[example.split()[1]]
        if isinstance(command, click.Group):
            command = command.commands[example.split()[2]]
        variants = getattr(command, "variants", {})
        command = next((variants[each] for each in example.split() if each in variants), command)
        options = set(variants) | {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = set(re.findall(r"--[a-z-]+", example))
        assert used <= options, example


def test_the_readme_starts_with_the_two_commands() -> None:
    blocks = re.findall(
        r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks[0] == "make quickstart\n"
    assert "make test\n" in blocks
