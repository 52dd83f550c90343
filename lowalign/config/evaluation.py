"""The options of the commands that measure policies, as one dataclass each.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.sections import BaseConfig, Model, OutDir, PromptFormat, Sampling
from lowalign.errors import UserError

Policy = Annotated[str, tyro.conf.arg(metavar="POLICY")]
BARE = ("base", "off")  # words for the base without adapters


@dataclass(frozen=True)
class CompareConfig:
    """Compare policies: they answer the same prompts on one loaded base, and a judge says which answers are better.

    A POLICY is a run, an adapter folder or a Hub id, or `base` (also `off`) for the base without adapters.
    """

    a: Policy
    """The policy whose win rate is measured."""
    b: Policy
    """The policy it is compared with."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]
    """JSON or JSONL files, or Hub dataset ids, of rows with a prompt or messages. Answers in the rows are ignored."""
    out: OutDir
    """Folder of the comparison."""
    others: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY")] = ()
    """More policies: all are compared with each other, and get Bradley-Terry ratings."""
    judge: Annotated[str, tyro.conf.arg(metavar="JUDGE")] = "model"
    """What judges: RUN (a reward run), FILE.py:NAME (a Python function of prompts and completions that returns numbers), or
    model: the base itself is asked, in both orders."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one that the first run names."""
    prompt_format: PromptFormat | None = None
    """Prompts that are strings. text: plain text, without the chat template. chat: a turn of the user. Default: what the
    policies were trained on; text where that is not known."""
    n: int = 1
    """Answers of each policy to each prompt."""
    limit: int | None = None
    """Use only the first N prompts, for a trial."""
    max_prompt: int = 1024
    """Maximum tokens of a prompt. Longer prompts are left out."""
    template: Path | None = None
    """The question to a judging model: a Jinja file with the variables prompt, a and b. It must answer with the letter A or
    B."""
    margin: float = 0.0
    """A mean log-odds (or difference of scores) below this is a tie."""
    max_length: int = 4096
    """Maximum tokens that the judge reads at a time. Pairs that need more are left out and counted."""
    token_budget: int = 8192
    """Maximum tokens of a forward of the judge: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    resume: bool = False
    """Resume from the answers and verdicts in OUT."""
    sampling: Sampling = field(default_factory=Sampling)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"--n is {self.n}; it must be at least 1")
        if self.margin < 0:
            raise UserError(f"--margin is {self.margin}; it must be 0 or more")
        if self.judge in BARE:
            raise UserError(f"--judge {self.judge}: to ask the base itself, give --judge model")
        if self.template and self.judge != "model":
            raise UserError(f"--template is the question to a judging model; --judge {self.judge} is asked nothing")

    @property
    def policies(self) -> tuple[str, ...]:
        """All of them, a and b first."""
        return (self.a, self.b, *self.others)


@dataclass(frozen=True)
class EvalConfig:
    """Measure adapters and the base without them on held-out rows, or on benchmarks of lm-eval, with one load of the base."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = ()
    """Rows of sft or of preferences. Each file is a line of the figures by source."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run, an adapter folder or a Hub id: a policy or a reward run. Repeat the flag for several."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one that the first run names."""
    out: Path | None = None
    """JSON file for the figures."""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text: plain text, without the chat template. chat: turns of user and assistant.
    Default: what the adapters were trained on; text where that is not known."""
    tasks: str | None = None
    """Instead of data: names of lm-eval tasks, with commas (pip install lowalign[eval])."""
    task_folder: Path | None = None
    """With tasks: a folder of your own task files."""
    fewshot: int | None = None
    """With tasks: solved examples before each question. Default: what the task says."""
    chat_template: bool = False
    """With tasks: put questions through the chat template."""
    beta: float = 0.1
    """Preferences: the reward of a policy is beta times the log-ratio to the base without adapters (DPO)."""
    max_length: int = 2048
    """Maximum tokens of a prompt with its completion. Longer prompts are cut from the left."""
    limit: int | None = None
    """Use only the first N rows of each file, or N questions of each task, for a trial."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """Bad rows: refuse to start, or skip them."""
    token_budget: int = 8192
    """Maximum tokens of a forward: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.tasks):
            raise UserError("eval takes either --data FILE… or --tasks NAME,NAME…")
        if self.data and (self.task_folder or self.fewshot is not None or self.chat_template):
            raise UserError("--task-folder, --fewshot and --chat-template are options of --tasks")
        if not self.adapter and self.model is None:
            raise UserError("nothing to measure: give --adapter RUN, or --model M for the base alone")
        if not 0 < self.beta < float("inf"):
            raise UserError(f"--beta is {self.beta}; it must be above 0")


@dataclass(frozen=True)
class JudgeConfig:
    """Compare answers in pairs with a judge model, in both orders. Verdicts that agree become preferences."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]
    """Rows with prompt and completions; or prompt, completion_a and completion_b; or prompt and completion, one answer
    per row."""
    out: OutDir
    """Folder of the run. The preferences are written to OUT/pairs.jsonl."""
    model: str | None = None
    """The judge, or the base of the reward run: a folder or a Hub id. Not needed for a Python function."""
    adapter: str | None = None
    """The judge's adapter: a run, an adapter folder or a Hub id."""
    reward: tuple[str, ...] = ()
    """Compare the answers by their scores instead: [WEIGHT*]RUN for a reward run, or [WEIGHT*]FILE.py:NAME for a Python
    function of prompts and completions that returns numbers. Several: their weighted sum."""
    template: Path | None = None
    """The judge's prompt: a Jinja file with the variables prompt, a and b. The judge must answer with the letter A or B."""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text (default): plain text, without the chat template. chat: turns of user and
    assistant."""
    margin: float = 0.0
    """A mean log-odds (or difference of scores) below this is a tie."""
    max_length: int = 4096
    """Maximum tokens of one judge prompt. Pairs that need more are skipped."""
    token_budget: int = 8192
    """Maximum tokens of a forward: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    allow_training_spread: bool = False
    """In a sum of rewards, accept a reward run whose mean and spread were measured on the rows it was trained on."""
    resume: bool = False
    """Resume from the verdicts in OUT."""
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"--margin is {self.margin}; it must be 0 or more")
        if not self.reward and self.model is None:
            raise UserError("no judge: give --model M, or --reward SPEC")
        if self.reward and (self.adapter or self.template):
            raise UserError("--adapter and --template are options of a judge model; with --reward there is none")


@dataclass(frozen=True)
class ScoreConfig:
    """Score completions with a reward run: one line of JSON per completion; for preferences, also the accuracy."""

    model: Model
    """Base model, a folder or a Hub id."""
    adapter: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """Reward run, an adapter folder or a Hub id."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]
    """Rows of sft or of preferences."""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text (default): plain text, without the chat template. chat: turns of user and
    assistant."""
    out: Path | None = None
    """Output file, which grows block by block. It must not exist, unless with --resume. Default: standard output."""
    max_length: int = 2048
    """Maximum tokens of a prompt with its completion. Longer prompts are cut from the left."""
    limit: int | None = None
    """Use only the first N rows of each file, for a trial."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """Bad rows: refuse to start, or skip them."""
    token_budget: int = 8192
    """Maximum tokens of a forward: memory and speed."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    resume: bool = False
    """Resume from the scores in the output file."""
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise UserError("--resume goes on with a file: give it with --out FILE")
