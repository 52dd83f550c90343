"""The options of each other command, as one dataclass.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.ranges import Checked, NonNegativeInt, PositiveInt
from lowalign.config.rows import FilePromptsConfig, ShortPromptsConfig
from lowalign.config.sections import (
    AdapterConfig,
    BaseConfig,
    Model,
    OutDir,
    PreferenceConfig,
    PreferenceShapeName,
    RevisionConfig,
    Sampling,
    ShapeName,
    TrainConfig,
)
from lowalign.errors import UserError


@dataclass(frozen=True)
class ChatConfig(Checked):
    """Talk to a model in the terminal. Several adapters are loaded on one base; /use switches between them."""

    adapters: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_OR_ADAPTER…")] = ()
    """Runs, adapter folders or Hub ids. Each is called by the name of its folder; the first one answers."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one the last run names."""
    system: str | None = None
    """System message."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512, temperature=0.7, top_p=0.95))
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapters and self.model is None:
            raise UserError("nothing to talk to: lowalign chat RUN_OR_ADAPTER… or lowalign chat --model M")


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Sample completions of prompts: one line of JSON (prompt, completion) per completion."""

    model: Model
    """Base model, a folder or a Hub id."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A run, an adapter folder or a Hub id. Repeat the flag to apply several together."""
    prompt: str | None = None
    """One prompt, as text."""
    data: FilePromptsConfig = field(default_factory=FilePromptsConfig)
    n: PositiveInt = 1
    """Completions per prompt."""
    out: Path | None = None
    """Output file, which grows block by block. It must not exist, unless with --resume. Default: standard output."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    resume: bool = False
    """Resume from the completions in the output file."""
    sampling: Sampling = field(default_factory=Sampling)
    base: BaseConfig = field(default_factory=BaseConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (not self.data.files):
            raise UserError("generate takes either --prompt TEXT or --data FILE")
        if self.resume and self.out is None:
            raise UserError("--resume goes on with a file: give it with --out FILE")


@dataclass(frozen=True)
class RoundConfig:
    """With train: supervised fine-tuning on the best completions of each round."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    max_length: PositiveInt = 2048
    """Maximum tokens of one example. A longer one keeps its completion; its prompt is cut from the left."""


@dataclass(frozen=True)
class BestOfNConfig(Checked):
    """Best-of-n: sample n completions per prompt, score them, write the best as data for sft, dpo and reward."""

    model: Model
    """Base model, a folder or a Hub id."""
    out: OutDir
    """Folder of the run."""
    data: ShortPromptsConfig = field(default_factory=ShortPromptsConfig)
    adapter: tuple[str, ...] = ()
    """The policy: runs, adapter folders or Hub ids, applied together. Default: the base without adapters."""
    reward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPEC")] = ()
    """What scores the completions: [WEIGHT*]RUN for a reward run, or [WEIGHT*]FILE.py:NAME for a Python function of prompts
    and completions that returns numbers. Several: their weighted sum, with scores of reward runs standardised."""
    n: PositiveInt = 8
    """Completions per prompt."""
    token_budget: PositiveInt = 8192
    """Maximum tokens of a forward that scores: memory and speed. A single longer completion still fits."""
    unfinished: Literal["skip", "keep"] = "skip"
    """Completions cut off at the length limit. skip: never prefer one to another completion, which would teach to stop
    there. keep: treat them like the others."""
    rounds: PositiveInt = 1
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
        super().__post_init__()
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
class DataCheckConfig(Checked):
    """Report the format, lengths and dropped rows of data files, what should be cleaned in them, and examples with their
    supervised tokens marked. Exits with 1 when training would refuse the rows."""

    model: Model
    """Base model whose tokenizer and chat template are used, a folder or a Hub id."""
    rows: NonNegativeInt = 3
    """Number of examples to show with their supervised tokens marked."""
    examples: Path | None = None
    """New JSONL file for all examples: source, ids of prompt and completions, masks, text with supervised parts in «…»."""
    json: bool = False
    """Print the report as JSON, and no examples."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE…")] = ()
    """What to check, before the flags: files, folders, globs, - or Hub datasets, as --data takes them."""
    data: AnyDataConfig = field(default_factory=AnyDataConfig)
    base: RevisionConfig = field(default_factory=RevisionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.files or self.data.files):
            raise UserError("no FILE to check: lowalign data check FILE… --model M")


@dataclass(frozen=True)
class DataConvertConfig(Checked):
    """Write the rows of any source as JSONL in the columns of lowalign's row formats. No model is needed."""

    out: Annotated[Path, tyro.conf.arg(metavar="FILE.jsonl")]
    """New file."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE…")] = ()
    """What to convert, before the flags: files, folders, globs, - or Hub datasets, as --data takes them."""
    data: AnyDataConfig = field(default_factory=AnyDataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.files or self.data.files):
            raise UserError("no FILE to convert: lowalign data convert FILE… --out rows.jsonl")


@dataclass(frozen=True)
class DataPresetsConfig:
    """List the presets and templates of --data.preset, or print one."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """The one to print."""


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
class PipelineConfig(Checked):
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
