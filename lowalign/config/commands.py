"""What each command that does not train takes: its options, as one dataclass.

A field is a flag, a YAML key and a line of the docs; its docstring is the help text. Nothing here imports torch, so
`lowalign --help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.sections import (
    AdapterConfig,
    BaseConfig,
    PreferenceConfig,
    PreferenceShapeName,
    Sampling,
    ShapeName,
    TrainConfig,
)
from lowalign.errors import UserError


@dataclass(frozen=True)
class GenerateConfig:
    """Prompts in, completions out: a line of JSON (prompt, completion) for each completion."""

    model: str
    """The base: a folder or a Hub id."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run, an adapter folder or a Hub id. Given several times, they act together."""
    prompt: str | None = None
    """One prompt, written out."""
    prompts: Path | None = None
    """A file of prompts: JSON or JSONL rows with prompt or messages."""
    raw: bool = False
    """Give the prompt to the model as it stands, without the chat template."""
    n: int = 1
    """Completions of each prompt."""
    out: Path | None = None
    """File to write to, instead of the terminal."""
    allow_base_mismatch: bool = False
    """Use the adapters even if they were trained on another base."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    base: BaseConfig = field(default_factory=BaseConfig)


@dataclass(frozen=True)
class JudgeConfig:
    """Which of two answers is better, asked in both orders: what stays the same becomes a preference."""

    data: tuple[str, ...]
    """Rows with prompt and completions, with prompt, completion_a and completion_b, or with prompt and completion, one
    answer a row."""
    out: Path
    """Folder of the run. The preferences are written to OUT/pairs.jsonl."""
    model: str | None = None
    """The judge, or the base of the reward model: a folder or a Hub id. A Python function needs none."""
    adapter: str | None = None
    """The judge's adapter: a run, an adapter folder or a Hub id."""
    reward: tuple[str, ...] = ()
    """Score the answers instead of asking: [WEIGHT*]RUN for a reward run, [WEIGHT*]FILE.py:NAME for a Python function
    that is given prompts and completions and returns numbers; of several the weighted sum."""
    template: Path | None = None
    """What the judge is asked: a Jinja file that is given prompt, a and b. Its answer is to be the letter A or B."""
    margin: float = 0.0
    """A mean log-odds (or a difference of scores) smaller than this is a tie."""
    max_length: int = 4096
    """Most tokens of one question; answers that make a longer one are skipped."""
    token_budget: int = 8192
    """Most tokens on the card at a time."""
    allow_base_mismatch: bool = False
    """Use the adapters even if they were trained on another base."""
    resume: bool = False
    """Go on from the verdicts in OUT."""
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"--margin is {self.margin}; it must be 0 or more")
        if not self.reward and self.model is None:
            raise UserError("who is to judge? Give --model M, or --reward SPEC")
        if self.reward and (self.adapter or self.template):
            raise UserError(
                "--adapter and --template belong to a model that is asked; --reward scores the answers instead"
            )


@dataclass(frozen=True)
class RoundConfig:
    """What each round of --train makes of its best completions: supervised fine-tuning."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    max_length: int = 2048
    """Most tokens of one example. Too long: the completion is kept and the prompt is cut from the left."""


@dataclass(frozen=True)
class BestOfNConfig:
    """Best-of-n: n completions of each prompt are sampled and scored; the best become data for sft, dpo and reward."""

    model: str
    """The base: a folder or a Hub id."""
    out: Path
    """Folder of the run."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = ()
    """Prompts: JSON or JSONL files, or Hub dataset ids, with a prompt or messages. Answers and preferences in them are
    left out."""
    adapter: tuple[str, ...] = ()
    """The policy: runs, adapter folders or Hub ids that act together; the bare base when left out."""
    reward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPEC")] = ()
    """What scores the completions: [WEIGHT*]RUN for a reward run, [WEIGHT*]FILE.py:NAME for a Python function that is
    given prompts and completions and returns numbers; of several the weighted sum, reward runs standardised."""
    n: int = 8
    """Completions of each prompt."""
    limit: int | None = None
    """Use only the first N prompts."""
    max_prompt: int = 1024
    """Prompts of more tokens are left out."""
    token_budget: int = 8192
    """Most tokens scored at a time, unless a single completion is longer. Memory and speed."""
    raw: bool = False
    """Give prompts to the model as they stand, without the chat template."""
    unfinished: Literal["skip", "keep"] = "skip"
    """Completions cut off at the length limit: skip never takes one as the best (sft would learn to end there)."""
    rounds: int = 1
    """With --train: how often to sample, pick and train."""
    train: bool = False
    """Train on the best completions, and sample the next round from what was trained (rejection sampling)."""
    allow_base_mismatch: bool = False
    """Use the adapters even if they were trained on another base."""
    resume: bool = False
    """Go on from what is in OUT."""
    sampling: Sampling = field(default_factory=Sampling)
    sft: RoundConfig = field(default_factory=RoundConfig)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if self.n < 1 or self.rounds < 1:
            raise UserError("--n and --rounds must be at least 1")
        if self.rounds > 1 and not self.train:
            raise UserError("--rounds goes with --train: without training every round is the same")
        if self.train and len(self.adapter) > 1:
            raise UserError("--train goes on from one --adapter; a run brings along those it was trained on top of")


@dataclass(frozen=True)
class ScoreConfig:
    """Score completions with a reward run: a line of JSON for each completion; for preferences the accuracy too."""

    model: str
    """The base: a folder or a Hub id."""
    adapter: str
    """The reward run, an adapter folder or a Hub id."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]
    """Rows of sft or of preferences."""
    out: Path | None = None
    """File to write to, instead of the terminal."""
    max_length: int = 2048
    """Most tokens of a prompt and its completion; too long prompts are cut from the left."""
    limit: int | None = None
    """Use only the first N rows of each file."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """What to do with bad rows: refuse to start, or leave them out."""
    token_budget: int = 8192
    """Most tokens on the card at a time."""
    allow_base_mismatch: bool = False
    """Use the adapter even if it was trained on another base."""
    base: BaseConfig = field(default_factory=BaseConfig)


@dataclass(frozen=True)
class AnyDataConfig(PreferenceConfig):
    """The rows to look at, of sft or of preferences."""

    shape: ShapeName | PreferenceShapeName = "auto"
    """The shape of the rows; auto tells it from their columns."""


@dataclass(frozen=True)
class DataCheckConfig:
    """Show what is recognised in files of rows: their shape, lengths, drops, and a few rows with what is supervised."""

    model: str
    """The base whose tokenizer and chat template are used: a folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    rows: int = 3
    """Examples shown with their supervised tokens marked."""
    data: AnyDataConfig = field(default_factory=AnyDataConfig)
