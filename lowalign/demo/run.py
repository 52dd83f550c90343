"""`lowalign demo`: align a base of a tiny world and measure what each stage gained, by the world's own exact score."""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lowalign.config import AdapterConfig, DataConfig, Sampling, SFTConfig, TrainConfig
from lowalign.data.chat import Chat
from lowalign.demo import world
from lowalign.model.base import Base
from lowalign.model.host import Host
from lowalign.model.start import load_stack
from lowalign.run import sft

BASE = Path(__file__).parent / "base"
ASKED = 128  # held-out instructions a stage is measured on
SHOWN = 3
DRAW = Sampling(max_new_tokens=96, temperature=1.0, seed=1, max_rows=128)


@dataclass
class Stage:
    """How the answers of one stage did on held-out instructions: means of the parts of the world's score, 0 to 1."""

    name: str
    place: float
    stopped: float
    cheerful: float
    total: float
    answers: list[str]


def main() -> int:
    """Run the demo. Returns the exit code."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # a model this small is slower on several
    out = Path(tempfile.mkdtemp(prefix="lowalign-demo-"))
    base = Base.load(BASE)
    chat = Chat(base.tokenizer)
    stages = [measure("base", base, chat, ())]
    show(stages[-1])

    data = out / "sft.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in world.sft_rows(1600, seed=0)))
    held_out = out / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in world.sft_rows(64, seed=0, split="held_out")))
    config = SFTConfig(
        model=str(BASE),
        out=out / "sft",
        data=DataConfig(files=(str(data),), eval=(str(held_out),), cache=False),
        adapter=AdapterConfig(r=16, alpha=32),
        train=TrainConfig(steps=100, batch_size=16, learning_rate=5e-3, checkpointing="off", log_every=20),
    )
    print("\nSFT: a LoRA on the 4-bit base learns to follow instructions and to stop", file=sys.stderr)
    if code := sft(config, base):
        return code
    stages.append(measure("sft", base, chat, (str(out / "sft"),)))
    show(stages[-1])
    table(stages, losses(out / "sft"), out, time.perf_counter() - started)
    return 0


def measure(name: str, base: Base, chat: Chat, adapters: tuple[str, ...]) -> Stage:
    """Sample an answer to each held-out instruction under these adapters, and score it."""
    host = Host(base)
    stack = [n for i, a in enumerate(adapters) for n in load_stack(host, f"{name}-{i}", a)]
    asked = world.prompts(ASKED, seed=0, split="held_out")
    with host.use(*stack):
        found = host.generate([chat.prompt_ids(messages) for messages in asked], sampling=DRAW)
    for n in stack:
        host.delete(n)
    answers = [base.tokenizer.decode(c.ids, skip_special_tokens=True) for (c,) in found]
    scores = [world.score(m, text, c.stopped) for m, text, (c,) in zip(asked, answers, found, strict=True)]
    means = {key: sum(getattr(s, key) for s in scores) / ASKED for key in ("place", "stopped", "cheerful", "total")}
    shown = [f"{m[0]['content']}\n{indent(text)}" for m, text in zip(asked, answers, strict=True)]
    return Stage(name, **means, answers=shown[:SHOWN])


def show(stage: Stage) -> None:
    """Some answers, as they are."""
    print(f"\n--- what the {stage.name} answers")
    for answer in stage.answers:
        print(answer)


def indent(text: str, width: int = 160) -> str:
    """An answer under its question, cut when it is long."""
    text = text if len(text) <= width else text[:width] + " …"
    return "\n".join("    " + line for line in text.splitlines())


def losses(run: Path) -> tuple[float, float]:
    """Held-out loss before the first and after the last step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval/loss"] for line in lines if "eval/loss" in line]
    return found[0], found[-1]


def table(stages: list[Stage], loss: tuple[float, float], out: Path, seconds: float) -> None:
    """What each stage gained."""
    print(f"\nmeans over {ASKED} instructions about places and in words that no training row has")
    print(f"{'':8}{'held-out loss':>14}{'names the place':>17}{'stops in time':>15}{'cheerful':>10}{'score':>8}")
    for stage, value in zip(stages, loss, strict=True):
        print(
            f"{stage.name:8}{value:>14.3f}{stage.place:>17.0%}{stage.stopped:>15.0%}"
            f"{stage.cheerful:>10.2f}{stage.total:>8.2f}"
        )
    print(f"\n{seconds:.0f} s; everything that was written is in {out}")
