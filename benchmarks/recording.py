"""What sft, reward, best-of-n, dpo and ppo show on a terminal, as text: docs/recording.md.

    python benchmarks/recording.py --out DIR [--doc docs/recording.md]

The stages of `lowalign demo`, each as a command on a terminal of its own (a pty), on the CPU, in five minutes or more.
"""

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lowalign.config.recipe import dump
from lowalign.demo.configs import BASE, stage_config

LINES, COLUMNS = 40, 120
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOVEMENT = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])")
BAR = re.compile(r"(?:(?P<name>.+?): )? *(?P<at>\d+)(?:%\||\w+ \[)")
MOVES = {
    "sft": "The bar counts optimizer steps, with the loss and the speed of the last one. A small bar counts the weights while the base "
    "is loaded. The held-out loss is printed above the bar, before the first step and after the last.",
    "reward": "The bar counts optimizer steps. `accuracy` is the share of pairs in the right order, `margin` the mean difference of their "
    "scores. A second bar below it counts rows while the held-out ones are evaluated; at the end one counts the "
    "completions that are scored for the adapter's mean and spread.",
    "best-of-n": "The bar counts prompts, 64 at a time. The bar below it counts first the completions that are sampled, then those that "
    "are scored. The completions of a block end nearly together, so its number of tokens moves first.",
    "dpo": "The bar counts optimizer steps. `accuracy` and `margin` are of the pairs of the step. The loss is the sum of the losses of DPO "
    "and of SFT on the chosen answers (`dpo.sft: 1.0`).",
    "ppo": "The bar counts optimizer steps. It stands still while a round is sampled and scored; the bar below it moves then. "
    "`reward`, `KL` and `length` are of the round, so they change every four steps here.",
}
INTRODUCTION = """\
# What a run prints

The training verbs and `best-of-n` on a terminal: the stages of `lowalign demo` on its small base, one command each, recorded on a CPU by
`python benchmarks/recording.py`. The recipes are the stages of `pipelines/demo`. The times say nothing about speed; the
[benchmarks](benchmarks.md) do.

A bar overwrites its line; here its first, a middle and its last state are lines of their own, in the order of time.
A bar that comes back, once a round or a block, is shown once. The bar of a part of the work appears after a second. In a file or a
pipe there are no bars; each logged step is a line instead. The last lines say how long it took, what to do next and where the result is.
"""


def main() -> None:
    """Run the stages in order and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--doc", type=Path, help="the document; default: OUT/recording.md")
    args = parser.parse_args()
    doc = (args.doc or args.out / "recording.md").resolve()
    args.out.mkdir(parents=True)
    os.chdir(args.out)  # all paths that are printed are relative to it
    shutil.copytree(BASE, "tiny-base")
    parts = [INTRODUCTION]
    for verb, moves in MOVES.items():
        recipe = Path(f"{verb}.yaml")
        recipe.write_text(dump(replace(stage_config(Path(), verb), resume=False, model="tiny-base")))
        words = ["lowalign", verb, str(recipe)]
        screen = on_a_terminal([sys.executable, "-m", *words])
        text = "\n".join(shown(screen))
        parts.append(f"## {verb}\n\n{textwrap.fill(moves, 120)}\n\n```text\n$ {' '.join(words)}\n{text}\n```\n")
    doc.write_text("\n".join(parts), encoding="utf-8")


def on_a_terminal(command: list[str]) -> str:
    """All that a command writes to its terminal. Raises CalledProcessError when it fails."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (LINES, COLUMNS))  # tqdm draws no bar on a terminal of 0 columns, which a new one has
    package = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": package}
    process = subprocess.Popen(command, env=environment, stdin=its, stdout=its, stderr=its)
    os.close(its)
    content = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux says so when the last writer has closed the terminal
            break
        if not piece:
            break
        content += piece
    os.close(ours)
    if process.wait():
        print(content.decode(errors="replace"), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return content.decode(errors="replace")


def shown(screen: str) -> list[str]:
    """The lines of a screen in the order of time. Of a bar, whose states overwrite each other: the first state, the one nearest to
    its middle, and the last, each where it was written. Of bars with the same name: the first bar."""
    lines: list[str | None] = []
    states: dict[str | None, list[State]] = {}
    repeated: set[str | None] = set()
    whole = 0  # where the bar without a name is, which counts steps or prompts
    for text in written(screen):
        match = BAR.match(text)
        if match is None:
            lines.append(text)
            continue
        name, at = match["name"], int(match["at"])
        bar = states.setdefault(name, [])
        if name is None:
            whole = at
        if bar and (at < bar[-1].at or (name and whole != bar[-1].whole)):
            repeated.add(name)
        if name not in repeated:
            bar.append(State(len(lines), at, whole, text))
            lines.append(None)
    for bar in states.values():
        middle = min(bar, key=lambda state: abs(state.at - bar[-1].at / 2))
        for state in (bar[0], middle, bar[-1]):
            lines[state.place] = state.text
    return [line for line in lines if line is not None]


class State(NamedTuple):
    """A bar at a moment. place: among the lines. at: its percentage, or its count where it has no total. whole: that of the bar
    without a name."""

    place: int
    at: int
    whole: int
    text: str


def written(screen: str) -> Iterator[str]:
    """What was written to a line from its beginning, one after the other; a carriage return, a line feed or a movement of the
    cursor ends it. Blanks, which erase a line, are left out."""
    for text in MOVEMENT.split(COLOUR.sub("", screen)):
        if text.strip() and not MOVEMENT.fullmatch(text):
            yield text.rstrip()


if __name__ == "__main__":
    main()
