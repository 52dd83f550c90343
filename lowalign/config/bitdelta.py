"""The options of the `bitdelta` commands.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.ranges import Checked, PositiveInt
from lowalign.config.sections import AdapterConfig, BaseConfig, DataConfig, LearningRate, Model, OutDir, TrainConfig
from lowalign.errors import UserError

FineTuned = Annotated[str, tyro.conf.arg(metavar="F")]


@dataclass(frozen=True)
class DistilTrainConfig(TrainConfig):
    """The training loop. Few numbers are trained, and a step of log-scales is relative to the scale."""

    batch_size: PositiveInt = 8
    """Examples per optimizer step. Does not affect memory: see token_budget."""
    learning_rate: LearningRate = 5e-2
    """Peak learning rate."""
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = "adamw"
    """AdamW with 8-bit state in pageable memory, with 8-bit state, or with 32-bit state."""


@dataclass(frozen=True)
class DistilConfig(Checked):
    """Distil a BitDelta: train its scales so that it predicts what the fine-tuned model predicts."""

    model: Model
    """Base model, a folder or a Hub id."""
    out: OutDir
    """Folder of the run. The distilled delta is saved to OUT/adapter."""
    delta: Annotated[str, tyro.conf.arg(metavar="DELTA")]
    """The delta: a folder that `bitdelta compress` wrote, or an earlier distillation."""
    finetuned: FineTuned
    """The fine-tuned model, a folder or a Hub id."""
    data: DataConfig = field(default_factory=DataConfig)
    train: DistilTrainConfig = field(default_factory=DistilTrainConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    teacher_quantization: Literal["none", "nf4"] = "none"
    """How the fine-tuned model is loaded while its predictions are computed. nf4: in 4 bit, if it does not fit in 16."""
    allow_base_mismatch: bool = False
    """Accept a delta of another base."""
    resume: bool = False
    """Resume from the newest valid checkpoint in OUT."""

    # A run of lowalign.train.run that continues the delta itself.
    init_mode = "copy"

    @property
    def init(self) -> str:
        """The adapter that the run starts from."""
        return self.delta

    @property
    def adapter(self) -> AdapterConfig:
        """Its kind."""
        return AdapterConfig(kind="bitdelta")


@dataclass(frozen=True)
class CompressConfig(Checked):
    """BitDelta (arXiv 2402.10193): store a fine-tuned model as one bit for each weight that changed. With --data its scales
    are distilled too."""

    base: Model
    """The model it was fine-tuned from, a folder or a Hub id."""
    finetuned: FineTuned
    """The fine-tuned model: a folder (such as one that `lowalign merge` wrote) or a Hub id, in 16 or 32 bit."""
    out: OutDir
    """Folder of the delta. It must not exist. With --data: folder of the run; the distilled delta is OUT/adapter."""
    onto: Literal["dequantized", "original"] = "dequantized"
    """dequantized: the change is counted from the base in 4 bit, whose error the delta then corrects as well. original: from
    the base's own 16-bit weights, for use on them."""
    per_row: bool = False
    """A scale for each row of a matrix instead of one for the matrix."""
    data: DataConfig = field(default_factory=DataConfig)
    train: DistilTrainConfig = field(default_factory=DistilTrainConfig)
    teacher_quantization: Literal["none", "nf4"] = "none"
    """With --data: how the fine-tuned model is loaded while its predictions are computed. nf4: in 4 bit, if it does not fit
    in 16."""
    resume: bool = False
    """With --data: resume the distillation in OUT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.files and (self.resume or self.train != DistilTrainConfig()):
            raise UserError("--train and --resume are of the distillation, which needs rows: give --data FILE…")

    def distillation(self, compressed: Path) -> DistilConfig:
        """The run that distils the delta in this folder."""
        base = BaseConfig(quantization="nf4" if self.onto == "dequantized" else "none")
        return DistilConfig(
            self.base,
            self.out,
            str(compressed),
            self.finetuned,
            self.data,
            self.train,
            base,
            self.teacher_quantization,
            resume=self.resume,
        )
