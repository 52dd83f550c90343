"""The pictures of the docs, from real runs in the demo's world: docs/{sft,reward,best_of_n,dpo,ppo}.svg and docs/first_run.svg.

    python scripts/pictures.py --out OUT

OUT gets the runs: the stages of the demo with a line of metrics for each step and held-out rows (four minutes on one core), and a first
run as a user starts it, whose output becomes the terminal in first_run.svg. What is in OUT already is kept.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lowalign.config.pipeline import Stage, read_pipeline
from lowalign.demo import configs, world
from lowalign.demo.configs import BASE, BASE_CONFIG
from lowalign.model.base.base import Base
from lowalign.report.plot import COLORS, HEIGHT, WIDTH, Curve, metrics_plot, panel

DOCS = Path(__file__).parents[1] / "docs"
EVERY = {"sft": 10, "reward": 16, "dpo": 7}  # steps between evaluations
COMMANDS = (
    "lowalign sft --model tiny --data rows.jsonl --out runs/first --data.eval held_out.jsonl --data.no-cache --train.steps 60 "
    "--train.learning-rate 5e-3 --train.eval-every 20 --train.log-every 10 --base.dtype float32",
    'lowalign generate --model tiny --adapter runs/first --base.dtype float32 --prompt "Please write me a postcard from Bombay." --sampling.temperature 0',
)
NOT_OURS = ("kernels-community", "Warning", "warn(")  # lines of libraries, which depend on the machine
COLUMNS, LINE, LEFT, TOP = 118, 17, 16, 44  # characters of a line, its height in pixels, margins of the text
PLAYED = 12.0  # seconds that the terminal plays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out.resolve()
    torch.set_num_threads(1)
    make_runs(out)
    for name in ("sft", "reward", "dpo", "ppo"):
        (DOCS / f"{name}.svg").write_text(metrics_plot(out / name / "metrics.jsonl"), encoding="utf-8")
    (DOCS / "best_of_n.svg").write_text(best_of_n(out / "best-of-n" / "report.json"), encoding="utf-8")
    cast = out / "cast.json"
    if not cast.exists():
        cast.write_text(json.dumps(first_run(out / "first")))
    (DOCS / "first_run.svg").write_text(terminal(json.loads(cast.read_text())), encoding="utf-8")


def make_runs(out: Path) -> None:
    """The stages of the demo, with more metrics."""
    base = None
    for stage in read_pipeline(configs.demo_pipeline(out)):
        if stage.name == "merge" or (stage.out / "adapter").exists() or (stage.out / "report.json").exists():
            continue
        base = base or Base.load(BASE, **vars(BASE_CONFIG))
        module, _, function = stage.verb.function.partition(":")
        if getattr(import_module(f"lowalign.{module}"), function)(with_metrics(stage), base):
            raise SystemExit("stopped; the same command goes on")


def with_metrics(stage: Stage) -> Any:
    """The options of a stage, with a line for each step and evaluations."""
    config = stage.config
    if stage.name == "best-of-n":
        return config
    train = replace(config.train, log_every=1, eval_every=EVERY.get(stage.name, 0))
    data = replace(config.data, eval_rows=24) if stage.name == "dpo" else config.data
    return replace(config, train=train, data=data, resume=config.out.exists())


def best_of_n(report: Path) -> str:
    """The mean reward of the best of n."""
    rewards = json.loads(report.read_text())["mean_reward"]
    curve = Curve("mean reward", [(int(n), value) for n, value in rewards.items()], COLORS[""], marked=True)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    title = '<text x="52" y="16" font-weight="bold">mean reward of the best of n</text>'
    return f'{head} font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n{title}{panel([curve])}</svg>\n'


# -- the terminal ------------------------------------------------------------------------------------------------------


def first_run(folder: Path) -> list[tuple[float, str]]:
    """(seconds since the start, line) of the commands and of what they print."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny").unlink(missing_ok=True)
    (folder / "tiny").symlink_to(BASE)
    configs.write(folder / "rows.jsonl", world.sft_rows(1120, seed=0))
    configs.write(folder / "held_out.jsonl", world.sft_rows(64, seed=0, split="held_out"))
    started = time.monotonic()
    lines = []
    for command in COMMANDS:
        lines.append((time.monotonic() - started, f"$ {command}"))
        words = [sys.executable, "-m", *shlex.split(command)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        with subprocess.Popen(
            words, cwd=folder, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes
        ) as process:
            for line in process.stdout:
                if not any(part in line for part in NOT_OURS):
                    lines.append((time.monotonic() - started, line.rstrip()))
        if process.returncode:
            raise SystemExit(f"{command} ended with {process.returncode}")
    return lines


def terminal(lines: list[tuple[float, str]]) -> str:
    """An SVG in which the lines appear as they did, faster. Without animation, or where less motion is asked for, all are there."""
    rows = [(at, part, i) for at, text in lines for i, part in enumerate(_wrapped(text))]
    end = max(at for at, *_ in rows) or 1.0
    width, height = 2 * LEFT + COLUMNS * 7.85, TOP + LINE * len(rows) + 8
    drawn = []
    for i, (at, text, part) in enumerate(rows):
        kind = (
            "c"
            if text.startswith("$ ") or (part and drawn and 'class="c' in drawn[-1])
            else "e"
            if "eval/" in text
            else "t"
        )
        delay = f' style="animation-duration:{PLAYED * at / end:.2f}s"'
        drawn.append(f'<text class="{kind}" x="{LEFT}" y="{TOP + LINE * (i + 0.7):.0f}"{delay}>{escape(text)}</text>')
    style = (
        "text{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre;animation:hidden 0s}"
        ".t{fill:#c9d1d9}.c{fill:#7ee787}.e{fill:#79c0ff}"
        "@keyframes hidden{from,to{opacity:0}}@media (prefers-reduced-motion:reduce){text{animation:none}}"
    )
    dots = "".join(
        f'<circle cx="{20 + 20 * i}" cy="18" r="6" fill="{c}"/>'
        for i, c in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img" aria-label="A terminal: {escape(COMMANDS[0].partition(" --")[0])}, then lowalign generate">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n{dots}\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _wrapped(text: str) -> list[str]:
    """Lines of the terminal; a command breaks at a space."""
    parts, command = [], text.startswith("$ ")
    while len(text) > COLUMNS:
        at = text.rfind(" ", 0, COLUMNS - 2)
        at = at if at > 40 else COLUMNS
        parts.append(text[:at] + " \\" * command)
        text = "    " + text[at:].lstrip()
    return [*parts, text]


if __name__ == "__main__":
    main()
