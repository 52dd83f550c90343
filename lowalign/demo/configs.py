"""What the stages of the demo train on. How they do is in the pipeline `pipelines/demo`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowalign.config.commands import PipelineConfig
from lowalign.config.pipeline import read_pipeline
from lowalign.config.sections import BaseConfig
from lowalign.demo import world
from lowalign.durable import write_jsonl

BASE = Path(__file__).parent / "base"
# What is not in 4 bit is in fp32: bf16 is ten times slower on a CPU without bf16 instructions, and no faster with AVX-512.
BASE_CONFIG = BaseConfig(dtype="float32")
BEST_OF = 8


def demo_pipeline(out: Path) -> PipelineConfig:
    """The demo's pipeline in this folder, whose rows it writes there."""
    rows = {
        "rows": ("sft", world.sft_rows(1120, seed=0)),
        "rows_held_out": ("sft_held_out", world.sft_rows(64, seed=0, split="held_out")),
        "rankings": ("rankings", world.ranking_rows(768, seed=0)),
        "rankings_held_out": ("rankings_held_out", world.ranking_rows(48, seed=0, split="held_out")),
        "prompts": ("prompts", [{"prompt": messages} for messages in world.prompts(176, seed=3)]),
        "ppo_prompts": ("ppo_prompts", [{"prompt": messages} for messages in world.prompts(240, seed=5)]),
    }
    files = tuple(f"{name}={write(out / f'{file}.jsonl', lines)}" for name, (file, lines) in rows.items())
    return PipelineConfig("pipelines/demo", out, model=str(BASE), set=files, base=BASE_CONFIG)


def stage_config(out: Path, name: str) -> Any:
    """The options of one stage, with its rows in the folder."""
    return next(stage.config for stage in read_pipeline(demo_pipeline(out)) if stage.name == name)


def write(file: Path, rows: Iterable[dict]) -> str:
    """Write rows as JSONL -> the file's name."""
    write_jsonl(file, rows)
    return str(file)
