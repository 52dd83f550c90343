"""Options of `lowalign synth`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lowalign.config.ranges import Checked, PositiveInt, Range
from lowalign.config.rows import SeedsConfig
from lowalign.config.sections import BaseConfig, Model, PromptFormat, Sampling
from lowalign.errors import UserError


@dataclass(frozen=True)
class SynthConfig(Checked):
    """Rows written by a model from annotation guidelines and a few seed rows (Self-Instruct, arXiv 2212.10560).

    A round samples prompts after the guidelines and some examples, drops those that are like a seed or an earlier row, samples
    answers to the rest, and keeps the best answer of each.
    """

    model: Model
    """Base model, a folder or a Hub id."""
    guidelines: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Text file: what the rows are about, what a good prompt and a good answer are."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.jsonl")]
    """The rows: prompt, completion, source, recipe. It must not exist, unless with --resume."""
    n: PositiveInt
    """Number of rows to write."""
    data: SeedsConfig = field(default_factory=SeedsConfig)
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run, an adapter folder or a Hub id. Repeat the flag to apply several together."""
    ask: PromptFormat = "text"
    """How the model is asked. text: it continues a list of examples, as a base model can. chat: a turn of the user, for a model
    that follows instructions."""
    shown: PositiveInt = 8
    """Examples in a prompt of the model, a quarter of them rows of earlier rounds (at most), the others seeds."""
    max_similarity: Annotated[float, Range(0, 1, above=True)] = 0.7
    """Prompts with a ROUGE-L of this or more to a seed or to an earlier row are dropped."""
    answers: PositiveInt = 1
    """Answers sampled to each prompt."""
    reward: tuple[str, ...] = ()
    """With several answers, what chooses the best: [WEIGHT*]RUN for a reward run, or [WEIGHT*]FILE.py:NAME for a Python function of
    prompts and completions that returns numbers. Default: the model is asked, as in `lowalign judge`."""
    prompt_template: Path | None = None
    """The prompt that asks for a task: a Jinja file with the variables guidelines, examples (prompt and completion each) and chat."""
    answer_template: Path | None = None
    """The prompt that asks for an answer: a Jinja file with the variables guidelines, examples, prompt and chat."""
    batch: PositiveInt = 32
    """Prompts sampled in a round."""
    patience: PositiveInt = 10
    """Stop when this many rounds in a row have given no row."""
    max_length: PositiveInt = 4096
    """Maximum tokens that a judge or a reward run reads at a time."""
    token_budget: PositiveInt = 8192
    """Maximum tokens of a forward that compares answers: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    allow_training_spread: bool = False
    """In a sum of rewards, accept a reward run whose mean and spread were measured on the rows it was trained on."""
    resume: bool = False
    """Resume from the rounds that are done. --n and --patience may change."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512, top_p=0.95))
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward and self.answers == 1:
            raise UserError("--reward chooses among answers: give --answers 2 or more")
        if self.sampling.temperature == 0:
            raise UserError("--sampling.temperature 0 writes the same row again and again: give one above 0")

    @property
    def margin(self) -> float:
        """Answers of any difference are told apart."""
        return 0.0
