"""What sft, reward, best-of-n, dpo and ppo show on a terminal, as text.

    python benchmarks/recording.py --out DIR [--doc FILE.md]

The stages of `lowalign demo`, each as a command on a terminal of its own (a pty), on the CPU. A bar moves by overwriting its line:
of each one the first, a middle and the last picture are kept.
"""

import argparse
import os
import pty
import re
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

from lowalign.config.recipe import dump
from lowalign.demo.configs import BASE, stage_config

WIDTH = 120
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
STAGES = ("sft", "reward", "best-of-n", "dpo", "ppo")
INTRODUCTION = """\
# On the terminal

What the training verbs show while they work and at their end: the stages of `lowalign demo`, each run as a command of its own on a
terminal, made by `python benchmarks/recording.py --out DIR` on a CPU. A progress bar overwrites its line;
here the first, a middle and the last picture of each bar are kept. Bars are for terminals and notebooks only: in a file or a
pipe each logged step is a line. The last line is the result, or the message when something was wrong.
"""


def main() -> None:
    """Run the stages in order and write the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; must not exist")
    parser.add_argument("--doc", type=Path, help="the document; default: OUT/recording.md")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True)
    parts = [INTRODUCTION]
    for verb in STAGES:
        file = out / f"{verb}.yaml"
        file.write_text(dump(replace(stage_config(out, verb), resume=False)))
        words = ["lowalign", verb, f"{verb}.yaml"]
        screen = on_a_terminal([sys.executable, "-m", *words], out)
        text = "\n".join(pictures(screen)).replace(str(BASE), "BASE").replace(f"{out}/", "")
        parts.append(f"## {verb}\n\n```text\n$ {' '.join(words)}\n{text}\n```\n")
    (args.doc or out / "recording.md").write_text("\n".join(parts))


def on_a_terminal(command: list[str], folder: Path) -> str:
    """All that a command writes to its terminal. Raises CalledProcessError when it fails."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (40, WIDTH))
    package = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"COLUMNS": str(WIDTH), "LINES": "40", "TERM": "xterm", "PYTHONPATH": package}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=its, stdout=its, stderr=its)
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


def pictures(screen: str) -> list[str]:
    """The lines that stay; of the pictures of a line that is overwritten, the first, a middle and the last."""
    lines: list[str] = []
    for line in COLOURS.sub("", screen).replace("\r\n", "\n").split("\n"):
        shown = list(dict.fromkeys(part.rstrip() for part in line.split("\r") if part.strip()))
        bars = [part for part in shown if "%|" in part or re.search(r"\d(row|completion|step|batch) \[", part)]
        kept = {0, len(bars) // 2, len(bars) - 1}
        lines += [bar for i, bar in enumerate(bars) if i in kept]
        lines += [part for part in shown if part not in bars][-1:]
    return lines


if __name__ == "__main__":
    main()
