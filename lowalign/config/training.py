"""What each command that trains takes: its options, as one dataclass.

A field is a flag, a YAML key and a line of the docs; its docstring is the help text. Nothing here imports torch, so
`lowalign --help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.sections import AdapterConfig, BaseConfig, DataConfig, PreferenceConfig, Sampling, TrainConfig
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


@dataclass(frozen=True)
class RolloutConfig:
    """What a round samples, and what its completions earn."""

    prompts: int = 32
    """Prompts of a round; a multiple of --train.batch-size."""
    samples: int = 4
    """Completions of each prompt, which is computed once for them."""
    missing_eos: Literal["penalise", "mask", "keep"] = "penalise"
    """Completions cut off at the length limit: take --rollout.eos-penalty off their reward, do not learn from them, or
    treat them like the others."""
    eos_penalty: float = 1.0
    """What a completion without an end loses."""
    length_penalty: float = 0.0
    """What every token costs."""
    normalise: Literal["none", "running"] = "none"
    """running: divide rewards by their spread over all rounds so far."""
    reward_clip: float = 0.0
    """Rewards are held within plus and minus this; 0: they are not."""
    show: int = 2
    """Completions of each round written to OUT/samples.jsonl."""


@dataclass(frozen=True)
class PPOLossConfig:
    """How the policy and its value function learn from a round."""

    advantage: Literal["gae", "group", "rloo"] = "gae"
    """gae: from a value function (arXiv 1506.02438). group: from the other samples of a prompt (GRPO, 2402.03300). rloo:
    likewise, leave-one-out (2402.14740)."""
    epochs: int = 4
    """Passes over the completions of a round."""
    clip: float = 0.2
    """The ratio to the policy that sampled is held within 1 ± this."""
    dual_clip: float = 0.0
    """Above 1: the loss of a bad token is held below this many advantages (arXiv 1912.09729); 0 turns it off."""
    gamma: float = 1.0
    """gae: discount of later rewards."""
    lam: float = 0.95
    """gae: 0 trusts the value function, 1 the rewards."""
    whiten: bool = True
    """gae: bring the advantages of a round to mean 0 and variance 1."""
    group_std: bool = True
    """group: divide by the spread of a prompt's rewards (off: arXiv 2503.20783)."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_clip: float = 0.2
    """The value is held within plus and minus this of what it was; 0 turns it off."""
    kl: float = 0.05
    """Coefficient of the divergence from the reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: taken off each token's reward (k1). loss: a term of the loss (k3, as in GRPO)."""
    kl_target: float | None = None
    """Move the coefficient so that a completion's KL nears this many nats (arXiv 1909.08593)."""
    kl_horizon: int = 10_000
    """Completions over which the coefficient is moved."""
    stop_at_kl: float = 0.0
    """End a round's epochs when a step's approx_kl exceeds this; 0: never."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    ptx_data: tuple[str, ...] = ()
    """PPO-ptx: rows of sft or pretraining text mixed into every step (arXiv 2203.02155)."""
    ptx_coef: float = 1.0
    """PPO-ptx: weight of their loss per token."""


@dataclass(frozen=True)
class ValueConfig:
    """The value function of gae: an adapter of its own with a scalar head."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    share: bool = False
    """A head on the policy's hidden states instead: half the work, and the policy has to serve both."""
    learning_rate: float = 1.0
    """Its learning rate as a multiple of --train.learning-rate."""


@dataclass(frozen=True)
class PPOConfig(RunConfig):
    """PPO: sample, score, learn; policy, reference, value and reward are adapters on one base."""

    reward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPEC")] = ()
    """What scores the completions: [WEIGHT*]RUN for a reward run, [WEIGHT*]FILE.py:NAME for a Python function that is
    given prompts and completions and returns numbers; of several the weighted sum, reward runs standardised."""
    reference: str = "start"
    """start: what the policy started from (--init, or the base). base: the bare base. Or a run or adapter folder."""
    sampling: Sampling = field(default_factory=Sampling)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOLossConfig = field(default_factory=PPOLossConfig)
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        r, c = self.rollout, self.ppo
        checks = {
            "--adapter.dropout": (
                not self.adapter.dropout,
                "0: with dropout the ratio to the sampling policy is noise",
            ),
            "--value.adapter.dropout": (not self.value.adapter.dropout, "0: with dropout its values are noise"),
            "--rollout.prompts": (r.prompts % self.train.batch_size == 0, "a multiple of --train.batch-size"),
            "--rollout.samples": (r.samples >= (1 if c.advantage == "gae" else 2), "2 or more: group and rloo compare"),
            "--sampling.temperature": (
                self.sampling.temperature > 0,
                "above 0: a policy that never varies learns nothing",
            ),
            "--ppo.kl-target": (c.kl_target is None or c.kl_target > 0, "above 0"),
            "--ppo.dual-clip": (c.dual_clip == 0 or c.dual_clip > 1, "0, or above 1"),
            "--value.share": (not self.value.share or c.advantage == "gae", "off: only gae has a value function"),
            "--ppo.kl-target with --ppo.kl": (c.kl_target is None or c.kl > 0, "a coefficient to begin with, above 0"),
        }
        for flag, (fine, needed) in checks.items():
            if not fine:
                raise UserError(f"{flag} must be {needed}")
