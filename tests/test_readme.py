"""Every command of README and docs names a script that is there, flags and choices that its --help knows."""
import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@lru_cache
def help_of(script):
    """What --help prints, in this process: to start Python and torch takes a second a script."""
    module = importlib.import_module(script.removesuffix(".py"))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
    assert ended.value.code == 0
    return printed.getvalue()


def commands_of(text):
    """(script, its arguments) of the lines in code blocks and in `code` that run one of ours."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|torchrun)[^`\n]*)`", text)
    for line in lines:
        for part in re.split("&&|;|#", line):  # what follows a # runs nothing
            if found := re.search(r"(?:python|torchrun)\s.*?([\w/]+\.py)\b(.*)", part):
                yield found[1], shlex.split(found[2])


def wrong_with(script, arguments):
    """What of a command does not exist, or None."""
    if not (ROOT / script).exists():
        return f"no {script}"
    if script.startswith("tests"):
        return None
    known = help_of(script)
    for i, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        flag = re.escape(word)
        if not re.search(rf"(^|[\s,\[]){flag}(?![\w-])", known):
            return f"{script} knows no {word}"

        # A flag with choices stands in the help as --flag {one,two}; what follows it is one of them.
        choices = re.search(rf"{flag} \{{([^}}]*)\}}", known)
        following = arguments[i + 1:i + 2]
        if choices and following and following[0] not in re.split(r"[,\s]+", choices[1]):
            return f"{script} {word} takes no {following[0]}"
    return None


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_exist(page):
    commands = list(commands_of((ROOT / page).read_text()))
    assert commands or page != "README.md"
    for script, arguments in commands:
        assert wrong_with(script, arguments) is None


def test_the_check_itself_can_fail():
    lines = ["python train.py --sll mae", "python trian.py", "torchrun -n 2 train.py --ssl dino  # --ok"]
    text = "\n".join(["```sh", *lines, "```", ""])
    assert [wrong_with(*command) for command in commands_of(text)] == [
        "train.py knows no --sll", "no trian.py", "train.py --ssl takes no dino"]


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    first_screen = " ".join(text.splitlines()[:45])
    assert text.count("\n") <= 190 and len(first_screen.split()) <= 350


def test_readme_needs_nothing_beside_the_repository():
    text = (ROOT / "README.md").read_text()
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!http)([^)#]+)", text))
