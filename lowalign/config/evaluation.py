"""The options of the commands that measure policies, as one dataclass each.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lowalign.config.ranges import Checked, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lowalign.config.rows import AnswersConfig, MeasuredRowsConfig, ShortPromptsConfig
from lowalign.config.sections import BaseConfig, Model, OutDir, Sampling
from lowalign.errors import UserError

Policy = Annotated[str, tyro.conf.arg(metavar="POLICY")]
BARE = ("base", "off")  # words for the base without adapters


@dataclass(frozen=True)
class CompareConfig(Checked):
    """Compare policies: they answer the same prompts on one loaded base, and a judge says which answers are better.

    A POLICY is a run, an adapter folder or a Hub id, or `base` (also `off`) for the base without adapters.
    """

    a: Policy
    """The policy whose win rate is measured."""
    b: Policy
    """The policy it is compared with."""
    out: OutDir
    """Folder of the comparison."""
    data: ShortPromptsConfig = field(default_factory=ShortPromptsConfig)
    others: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY")] = ()
    """More policies: all are compared with each other, and get Bradley-Terry ratings."""
    judge: Annotated[str, tyro.conf.arg(metavar="JUDGE")] = "model"
    """What judges: RUN (a reward run), FILE.py:NAME (a Python function of prompts and completions that returns numbers), or
    model: the base itself is asked, in both orders."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one that the first run names."""
    n: PositiveInt = 1
    """Answers of each policy to each prompt."""
    template: Path | None = None
    """The question to a judging model: a Jinja file with the variables prompt, a and b. It must answer with the letter A or
    B."""
    margin: NonNegativeFloat = 0.0
    """A mean log-odds (or difference of scores) below this is a tie."""
    max_length: PositiveInt = 4096
    """Maximum tokens that the judge reads at a time. Pairs that need more are left out and counted."""
    token_budget: PositiveInt = 8192
    """Maximum tokens of a forward of the judge: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    resume: bool = False
    """Resume from the answers and verdicts in OUT."""
    sampling: Sampling = field(default_factory=Sampling)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.files:
            raise UserError("no data: give --data FILE…")
        if self.judge in BARE:
            raise UserError(f"--judge {self.judge}: to ask the base itself, give --judge model")
        if self.template and self.judge != "model":
            raise UserError(f"--template is the question to a judging model; --judge {self.judge} is asked nothing")

    @property
    def policies(self) -> tuple[str, ...]:
        """All of them, a and b first."""
        return (self.a, self.b, *self.others)


@dataclass(frozen=True)
class EvalConfig(Checked):
    """Measure adapters and the base without them on held-out rows, or on benchmarks of lm-eval, with one load of the base."""

    data: MeasuredRowsConfig = field(default_factory=MeasuredRowsConfig)
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run, an adapter folder or a Hub id: a policy or a reward run. Repeat the flag for several."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one that the first run names."""
    out: Path | None = None
    """JSON file for the figures."""
    per_row: Path | None = None
    """JSONL file for the loss of each row, which --data.losses reads. With refusals: for the answers."""
    refusals: bool = False
    """Instead of losses: how often the prompts of each file are refused, such as a harmful and a harmless one."""
    refusal_judge: Annotated[str | None, tyro.conf.arg(metavar="FILE.py:NAME")] = None
    """With refusals: a Python function of prompts and completions that returns 1 for a refusal, else 0. Default: phrases that
    refusals begin with, in English and a few in German, French and Spanish."""
    tasks: str | None = None
    """Instead of data: names of lm-eval tasks, with commas (pip install lowalign[eval])."""
    task_folder: Path | None = None
    """With tasks: a folder of your own task files."""
    fewshot: NonNegativeInt | None = None
    """With tasks: solved examples before each question. Default: what the task says."""
    chat_template: bool = False
    """With tasks: put questions through the chat template."""
    beta: PositiveFloat = 0.1
    """Preferences: the reward of a policy is beta times the log-ratio to the base without adapters (DPO)."""
    token_budget: PositiveInt = 8192
    """Maximum tokens of a forward: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=128, temperature=0))
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks and (self.refusals or self.per_row):
            raise UserError("--refusals and --per-row are about --data, not about --tasks")
        if self.refusal_judge and not (self.refusals and ".py:" in self.refusal_judge):
            raise UserError("--refusal-judge takes FILE.py:NAME, and is an option of --refusals")
        if bool(self.data.files) == bool(self.tasks):
            raise UserError("eval takes either --data FILE… or --tasks NAME,NAME…")
        if self.data.files and (self.task_folder or self.fewshot is not None or self.chat_template):
            raise UserError("--task-folder, --fewshot and --chat-template are options of --tasks")
        if not self.adapter and self.model is None:
            raise UserError("nothing to measure: give --adapter RUN, or --model M for the base alone")


@dataclass(frozen=True)
class JudgeConfig(Checked):
    """Compare answers in pairs with a judge model, in both orders. Verdicts that agree become preferences."""

    out: OutDir
    """Folder of the run. The preferences are written to OUT/pairs.jsonl."""
    data: AnswersConfig = field(default_factory=AnswersConfig)
    model: str | None = None
    """The judge, or the base of the reward run: a folder or a Hub id. Not needed for a Python function."""
    adapter: str | None = None
    """The judge's adapter: a run, an adapter folder or a Hub id."""
    reward: tuple[str, ...] = ()
    """Compare the answers by their scores instead: [WEIGHT*]RUN for a reward run, or [WEIGHT*]FILE.py:NAME for a Python
    function of prompts and completions that returns numbers. Several: their weighted sum."""
    template: Path | None = None
    """The judge's prompt: a Jinja file with the variables prompt, a and b. The judge must answer with the letter A or B."""
    margin: NonNegativeFloat = 0.0
    """A mean log-odds (or difference of scores) below this is a tie."""
    max_length: PositiveInt = 4096
    """Maximum tokens of one judge prompt. Pairs that need more are skipped."""
    token_budget: PositiveInt = 8192
    """Maximum tokens of a forward: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    allow_training_spread: bool = False
    """In a sum of rewards, accept a reward run whose mean and spread were measured on the rows it was trained on."""
    resume: bool = False
    """Resume from the verdicts in OUT."""
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.files:
            raise UserError("no data: give --data FILE…")
        if not self.reward and self.model is None:
            raise UserError("no judge: give --model M, or --reward SPEC")
        if self.reward and (self.adapter or self.template):
            raise UserError("--adapter and --template are options of a judge model; with --reward there is none")


@dataclass(frozen=True)
class ScoreConfig(Checked):
    """Score completions with a reward run: one line of JSON per completion; for preferences, also the accuracy."""

    model: Model
    """Base model, a folder or a Hub id."""
    adapter: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Reward run, an adapter folder or a Hub id."""
    data: MeasuredRowsConfig = field(default_factory=MeasuredRowsConfig)
    out: Path | None = None
    """Output file, which grows block by block. It must not exist, unless with --resume. Default: standard output."""
    token_budget: PositiveInt = 8192
    """Maximum tokens of a forward: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    resume: bool = False
    """Resume from the scores in the output file."""
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.files:
            raise UserError("no data: give --data FILE…")
        if self.resume and self.out is None:
            raise UserError("--resume goes on with a file: give it with --out FILE")
