"""Every shell block of README and docs names commands, options, files and extras that exist.

Commands of dynplan and of the examples are parsed by their own parsers, without being run. Of scripts the
options are looked for in their source.
"""

import ast
import importlib
import re
import shlex

import pytest
import typer
from docs.blocks import ROOT, blocks

from dynplan.cli import app

BLOCKS = [block for block in blocks() if block.language == "sh"]
# Page and a part of the block -> why it is not checked.
NOT_CHECKED = {
    ("docs/region-loss-study.md", "--part learning-rate"): "it is of the example at commit 5133410",
}


def commands(text: str) -> list[list[str]]:
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def parse(application: typer.Typer, words: list[str]) -> None:
    """As the application would: unknown commands and options, missing ones and wrong values are errors."""
    command = typer.main.get_command(application)
    if hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context("docs", list(words))


def options_of(script) -> set[str]:
    """Options that a script's source names: strings, and parameters of functions that typer reads."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(node.value.split("/"))
        elif isinstance(node, ast.arg):
            found.add("--" + node.arg.replace("_", "-"))
    return found


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if "/" in word)
    elif words[:2] == ["-m", "dynplan.cli"]:
        parse(app, words[2:])
    elif words[0] == "-m":
        parse(importlib.import_module(f"{words[1]}.__main__").app, words[2:])
    else:
        script = ROOT / words[0]
        assert script.is_file(), f"no script {words[0]}"
        options = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        assert options <= options_of(script)


def check_pip(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = re.findall(r"^([\w-]+) = \[", table, re.MULTILINE)
    assert words[0] == "install"
    for word in words[1:]:
        if asked := re.fullmatch(r"(?:dynplan|\.)\[(.*)\]", word):
            assert set(asked[1].split(",")) <= set(extras), word


def check(words: list[str]) -> None:
    if words[0] == "dynplan":
        parse(app, words[1:])
    elif words[0] == "python":
        check_python(words[1:])
    elif words[0] in ("torchrun", "accelerate"):
        check_python(words[words.index("-m") :])
    elif words[0] == "pip":
        check_pip(words[1:])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), (
            words
        )
    else:
        raise AssertionError(f"nothing here knows what {words[0]} is: label the block or teach this test")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block):
    for (page, part), reason in NOT_CHECKED.items():
        if block.page == page and part in block.text:
            pytest.skip(f"{block}: {reason}")
    for words in commands(block.text):
        check(words)


def test_what_is_not_checked_is_still_there():
    for page, part in NOT_CHECKED:
        assert any(block.page == page and part in block.text for block in BLOCKS)


def test_languages():
    assert {block.language for block in blocks()} <= {"python", "sh", "text"}


@pytest.mark.parametrize(
    "line",
    [
        "dynplan finetun --model DIR",
        "dynplan finetune --modle DIR --train a --output b",
        "dynplan evaluate --model OUT --eval dev.jsonl --threads many",
        "python bench/compare_cpu.py --no-such-option",
        "python bench/no_such_script.py",
        "pip install dynplan[no-such-extra]",
        "make no-such-target",
        "no-such-program",
    ],
)
def test_wrong_commands_are_found(line):
    with pytest.raises(Exception, match=r"."):
        check(shlex.split(line))
