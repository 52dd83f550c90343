"""What each command that trains takes: its options, as one dataclass.

A field is a flag, a YAML key and a line of the docs; its docstring is the help text. Nothing here imports torch, so
`lowalign --help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowalign.config import AdapterConfig, BaseConfig, DataConfig, PreferenceConfig, TrainConfig
from lowalign.errors import UserError


@dataclass(frozen=True)
class RunConfig:
    """A run that trains an adapter."""

    model: str
    """The base: a folder or a Hub id."""
    out: Path
    """Folder of the run. The adapter is written to OUT/adapter."""
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    init: str | None = None
    """Start from this adapter: a run, an adapter folder or a Hub id."""
    init_mode: Literal["stack", "copy"] = "stack"
    """stack: the new adapter is put on the frozen old one. copy: the old one's weights are trained on.
    A soft prompt is always copied onto a soft prompt."""
    allow_base_mismatch: bool = False
    """Start from --init even if it was trained on another base."""
    resume: bool = False
    """Go on from the newest valid checkpoint in OUT."""


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning: learn to give the answers in the data."""


@dataclass(frozen=True)
class RewardLossConfig:
    """What the reward model learns."""

    loss: Literal["bradley-terry", "plackett-luce"] = "bradley-terry"
    """bradley-terry: every pair of a ranking, each ranking counting as one (arXiv 2203.02155, eq. 1). plackett-luce: the
    order as a whole."""
    centring: float = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps scores around zero (arXiv 2312.09244, eq. 2); 0.01 is usual."""


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """Reward model: a scalar head on an adapter learns to score completions as people rank them."""

    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardLossConfig = field(default_factory=RewardLossConfig)


@dataclass(frozen=True)
class DPOLossConfig:
    """What the policy learns from preferences."""

    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290). ipo (2310.12036). hinge (2305.10425). kto: for thumbs up or down (2402.01306).
    Without a reference: simpo (2405.14734), orpo (2403.07691)."""
    beta: float = 0.1
    """How strongly the policy is held to its reference; for simpo the scale of the margin, for orpo the weight of the
    odds-ratio term, for ipo its tau."""
    label_smoothing: float = 0.0
    """sigmoid: the share of preferences that are the wrong way round."""
    robust: bool = False
    """sigmoid with label smoothing: correct for the noise (robust DPO, arXiv 2403.00409) instead of smoothing (cDPO)."""
    gamma: float = 0.5
    """simpo: the margin that the chosen completion is to lead by."""
    sft: float = 0.0
    """Weight of the chosen completion's own loss per token, added to any of them (RPO, arXiv 2404.19733); orpo has it at 1."""
    desirable: float = 1.0
    """kto: weight of completions with thumbs up."""
    undesirable: float = 1.0
    """kto: weight of completions with thumbs down."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"--dpo.beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--dpo.label-smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        if (self.label_smoothing or self.robust) and self.loss != "sigmoid":
            raise UserError(f"--dpo.label-smoothing and --dpo.robust belong to --dpo.loss sigmoid, not {self.loss}")
        if self.sft and self.loss == "kto":
            raise UserError("--dpo.sft needs pairs, which --dpo.loss kto does without")


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    """DPO and its kin: the policy learns straight from preferences, without a reward model."""

    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)
    reference: str = "start"
    """start: what the policy started from (--init, or the base). base: the bare base. Or a run or adapter folder."""
    reference_cache: Literal["on", "off"] = "on"
    """Keep the reference's log-probs on disk, and use them again for the same rows, base and reference."""

    def __post_init__(self) -> None:
        if self.adapter.dropout:
            raise UserError(
                f"--adapter.dropout is {self.adapter.dropout}: with dropout the policy is not its reference at the start "
                "and their ratio is noise; leave it at 0"
            )
        if self.dpo.loss == "kto" and self.train.batch_size < 2:
            raise UserError("--dpo.loss kto measures its KL between the rows of a step: --train.batch-size 2 or more")
