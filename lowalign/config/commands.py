"""The options of each other command, as one dataclass.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.sections import (
    AdapterConfig,
    BaseConfig,
    Model,
    OutDir,
    PreferenceConfig,
    PreferenceShapeName,
    PromptFormat,
    Sampling,
    ShapeName,
    TrainConfig,
)
from lowalign.errors import UserError


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in the terminal. Several adapters are loaded on one base; /use switches between them."""

    adapters: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_OR_ADAPTER…")] = ()
    """Runs, adapter folders or Hub ids. Each is called by the name of its folder; the first one answers."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one the last run names."""
    system: str | None = None
    """System message."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(
        default_factory=lambda: Sampling(max_new_tokens=512, temperature=0.7, top_p=0.95)
    )
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if not self.adapters and self.model is None:
            raise UserError("nothing to talk to: lowalign chat RUN_OR_ADAPTER… or lowalign chat --model M")


@dataclass(frozen=True)
class GenerateConfig:
    """Sample completions of prompts: one line of JSON (prompt, completion) per completion."""

    model: Model
    """Base model, a folder or a Hub id."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run, an adapter folder or a Hub id. Repeat the flag to apply several together."""
    prompt: str | None = None
    """One prompt, as text."""
    prompts: Path | None = None
    """A file of prompts: JSON or JSONL rows with prompt or messages."""
    prompt_format: PromptFormat | None = None
    """Prompts that are strings. text: plain text, without the chat template. chat: a turn of the user. Default: what the
    adapter was trained on; text where that is not known."""
    n: int = 1
    """Completions per prompt."""
    out: Path | None = None
    """Output file, which grows block by block. It must not exist, unless with --resume. Default: standard output."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    resume: bool = False
    """Resume from the completions in the output file."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("generate takes either --prompt TEXT or --prompts FILE")
        if self.n < 1:
            raise UserError("--n must be at least 1")
        if self.resume and self.out is None:
            raise UserError("--resume goes on with a file: give it with --out FILE")


@dataclass(frozen=True)
class RoundConfig:
    """With train: supervised fine-tuning on the best completions of each round."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    max_length: int = 2048
    """Maximum tokens of one example. A longer one keeps its completion; its prompt is cut from the left."""


@dataclass(frozen=True)
class BestOfNConfig:
    """Best-of-n: sample n completions per prompt, score them, write the best as data for sft, dpo and reward."""

    model: Model
    """Base model, a folder or a Hub id."""
    out: OutDir
    """Folder of the run."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = ()
    """JSON or JSONL files, or Hub dataset ids, of rows with a prompt or messages. Answers in the rows are ignored."""
    adapter: tuple[str, ...] = ()
    """The policy: runs, adapter folders or Hub ids, applied together. Default: the base without adapters."""
    reward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPEC")] = ()
    """What scores the completions: [WEIGHT*]RUN for a reward run, or [WEIGHT*]FILE.py:NAME for a Python function of prompts
    and completions that returns numbers. Several: their weighted sum, with scores of reward runs standardised."""
    n: int = 8
    """Completions per prompt."""
    limit: int | None = None
    """Use only the first N prompts, for a trial."""
    max_prompt: int = 1024
    """Maximum tokens of a prompt. Longer prompts are left out."""
    token_budget: int = 8192
    """Maximum tokens of a forward that scores: memory and speed. A single longer completion still fits."""
    prompt_format: PromptFormat | None = None
    """Prompts that are strings. text (default): plain text, without the chat template. chat: a turn of the user. Where it is
    not given, an --adapter that was trained on the other format is refused."""
    unfinished: Literal["skip", "keep"] = "skip"
    """Completions cut off at the length limit. skip: never prefer one to another completion, which would teach to stop
    there. keep: treat them like the others."""
    rounds: int = 1
    """With train: number of rounds of sampling, choosing and training."""
    train: bool = False
    """Train on the best completions, then sample the next round from the trained policy (rejection sampling)."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    allow_training_spread: bool = False
    """In a sum of rewards, accept a reward run whose mean and spread were measured on the rows it was trained on."""
    resume: bool = False
    """Resume from the results in OUT."""
    sampling: Sampling = field(default_factory=Sampling)
    sft: RoundConfig = field(default_factory=RoundConfig)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        if self.n < 1 or self.rounds < 1:
            raise UserError("--n and --rounds must be at least 1")
        if self.rounds > 1 and not self.train:
            raise UserError("--rounds goes with --train: without training every round is the same")
        if self.train and len(self.adapter) > 1:
            raise UserError("--train continues from one --adapter; a run includes those it was trained on top of")


@dataclass(frozen=True)
class AnyDataConfig(PreferenceConfig):
    """The rows, of sft or of preferences."""

    shape: ShapeName | PreferenceShapeName = "auto"
    """Row format. auto: recognised from the columns."""


@dataclass(frozen=True)
class DataCheckConfig:
    """Report the format, lengths and dropped rows of data files, and show examples with their supervised tokens marked."""

    model: Model
    """Base model whose tokenizer and chat template are used, a folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    rows: int = 3
    """Number of examples to show with their supervised tokens marked."""
    examples: Path | None = None
    """New JSONL file for all examples: source, ids of prompt and completions, masks, text with supervised parts in «…»."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE…")] = ()
    """Files to check, before the flags: JSON or JSONL, or Hub dataset ids (NAME or NAME:SPLIT)."""
    data: AnyDataConfig = field(default_factory=AnyDataConfig)

    def __post_init__(self) -> None:
        if not (self.files or self.data.files):
            raise UserError("no FILE to check: lowalign data check FILE… --model M")


@dataclass(frozen=True)
class ShowRecipeConfig:
    """Print a recipe."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Name of a packaged recipe (lora/sft), or a YAML file."""
    full: bool = False
    """Every key with its explanation, not only those that differ from the defaults."""


@dataclass(frozen=True)
class CopyRecipeConfig(ShowRecipeConfig):
    """Copy a recipe, to edit it. An existing file is never overwritten."""

    dest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DEST")] = Path()
    """File or folder to copy to. In a folder, lora/sft becomes lora-sft.yaml."""


@dataclass(frozen=True)
class PipelineConfig:
    """Run the stages of a file on one load of the base. Finished stages are skipped, an interrupted one is resumed."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PIPELINE")]
    """A YAML file with stages, or the name of a pipeline that comes with lowalign, such as pipelines/sft_dpo."""
    out: OutDir
    """Folder of all stages: stage NAME is in OUT/NAME."""
    model: str | None = None
    """Base model of every stage, a folder or a Hub id. Default: the one in the file."""
    set: tuple[str, ...] = ()
    """NAME=VALUE…: what {NAME} stands for in the file."""
    dry_run: bool = False
    """Print the stages, and start none."""
    base: BaseConfig = field(default_factory=BaseConfig)
