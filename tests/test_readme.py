"""Every command of README and docs names a script that is there, flags and choices that its --help knows."""
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@lru_cache
def help_of(script):
    return subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout


def commands_of(text):
    """(script, its arguments) of the lines in code blocks and `code` that run one of ours, comments cut off."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|torchrun)[^`\n]*)`", text)
    for line in lines:
        for part in re.split("&&|;|#", line):
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
        if word.startswith("--") and not re.search(rf"(^|[\s,\[]){re.escape(word)}(?![\w-])", known):
            return f"{script} knows no {word}"
        choices = re.search(rf"{re.escape(word)} \{{([^}}]*)\}}", known) if word.startswith("--") else None
        if choices and i + 1 < len(arguments) and arguments[i + 1] not in re.split(r"[,\s]+", choices[1]):
            return f"{script} {word} takes no {arguments[i + 1]}"
    return None


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*.md")))])
def test_commands_of_the_page_exist(page):
    commands = list(commands_of((ROOT / page).read_text()))
    assert commands or page != "README.md"
    assert [wrong for script, words in commands if (wrong := wrong_with(script, words))] == []


def test_the_check_itself_can_fail():
    text = "```sh\npython train.py --sll mae\npython trian.py\ntorchrun -n 2 train.py --ssl dino  # --ok\n```\n"
    assert [wrong_with(*command) for command in commands_of(text)] == [
        "train.py knows no --sll", "no trian.py", "train.py --ssl takes no dino"]


def test_readme_is_short_and_needs_nothing_beside_the_repository():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150 and len(" ".join(text.splitlines()[:45]).split()) <= 350
    assert all((ROOT / link).exists() for link in re.findall(r"\]\((?!http)([^)#]+)", text))
