"""The options of each command that trains, as one dataclass.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from lowalign.config.cards import memory
from lowalign.config.ranges import (
    Checked,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
)
from lowalign.config.sections import (
    AdapterConfig,
    BaseConfig,
    DataConfig,
    Model,
    OutDir,
    PreferenceConfig,
    Sampling,
    TrainConfig,
)
from lowalign.errors import UserError


@dataclass(frozen=True)
class RunConfig(Checked):
    """A run that trains an adapter."""

    model: Model
    """Base model, a folder or a Hub id."""
    out: OutDir
    """Folder of the run. The adapter is saved to OUT/adapter."""
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    init: str | None = None
    """Adapter to start from: a run, an adapter folder or a Hub id."""
    init_mode: Literal["stack", "copy"] = "stack"
    """stack: train a new adapter on top of the frozen one. copy: continue training the weights of that one.
    A soft prompt that starts from a soft prompt is always a copy."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""
    fit: str | None = None
    """Set data.max_length and, of train, token_budget, checkpointing and keep_layers so that the run fits in this much memory, such as 24GB; --fit
    alone: in what is free. After ten steps the measured peak is compared with the predicted one."""
    resume: bool = False
    """Resume from the newest valid checkpoint in OUT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit is not None and self.fit != "auto":
            memory(self.fit, "--fit")


@dataclass(frozen=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning on the answers in the data."""

    neftune: NonNegativeFloat = 0.0
    """Noise on the embeddings in training (NEFTune's alpha, arXiv 2310.05914): 5 to 15 for answers in free form. 0: none."""


@dataclass(frozen=True)
class RewardLossConfig:
    """The loss of the reward model."""

    loss: Literal["bradley-terry", "plackett-luce"] = "bradley-terry"
    """bradley-terry: mean over the pairs of each ranking (arXiv 2203.02155, eq. 1). plackett-luce: likelihood of the
    complete order, per bit of it."""
    centring: NonNegativeFloat = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps scores near zero (arXiv 2312.09244, eq. 2). Usual: 0.01."""


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    """Reward model: an adapter with a scalar head, trained on preferences."""

    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward: RewardLossConfig = field(default_factory=RewardLossConfig)


@dataclass(frozen=True)
class DPOLossConfig:
    """The loss on preferences."""

    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290). ipo (2310.12036). hinge (2305.10425). kto: for thumbs up or down (2402.01306).
    Without a reference: simpo (2405.14734), orpo (2403.07691)."""
    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference: 0.01 (weak) to 0.5. ipo: its tau. simpo: scale of the margin, 2 to 10.
    orpo: weight of the odds-ratio term."""
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0
    """sigmoid: estimated fraction of preferences with chosen and rejected swapped."""
    robust: bool = False
    """sigmoid with label smoothing: robust DPO (arXiv 2403.00409) instead of cDPO."""
    gamma: NonNegativeFloat = 0.5
    """simpo: target margin between chosen and rejected."""
    sft: NonNegativeFloat = 0.0
    """Weight of an added SFT loss: the chosen completion's loss per token (RPO, arXiv 2404.19733). orpo always has it at 1."""
    desirable: NonNegativeFloat = 1.0
    """kto: weight of completions with thumbs up."""
    undesirable: NonNegativeFloat = 1.0
    """kto: weight of completions with thumbs down."""

    def __post_init__(self) -> None:
        if (self.label_smoothing or self.robust) and self.loss != "sigmoid":
            raise UserError(f"--dpo.label-smoothing and --dpo.robust belong to --dpo.loss sigmoid, not {self.loss}")
        if self.sft and self.loss == "kto":
            raise UserError("--dpo.sft needs pairs, which --dpo.loss kto does without")


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    """DPO and related losses: train the policy on preferences directly, without a reward model."""

    data: PreferenceConfig = field(default_factory=PreferenceConfig)
    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)
    reference: str = "start"
    """start: what the policy started from (--init, or the base). base: the base without adapters. Or a run or adapter folder."""
    reference_cache: Literal["on", "off"] = "on"
    """Keep the reference's log-probs on disk, and reuse them for the same rows, base and reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter.dropout:
            raise UserError(
                f"--adapter.dropout is {self.adapter.dropout}: with dropout the policy is not its reference at the start "
                "and their ratio is noise; leave it at 0"
            )
        if self.dpo.loss == "kto" and self.train.batch_size < 2:
            raise UserError("--dpo.loss kto measures its KL between the rows of a step: --train.batch-size 2 or more")


@dataclass(frozen=True)
class RolloutConfig:
    """One round: what is sampled, and how rewards are shaped."""

    prompts: PositiveInt = 32
    """Prompts per round, a multiple of train.batch_size."""
    samples: PositiveInt = 4
    """Completions per prompt. group and rloo need at least 2, better 4."""
    missing_eos: Literal["penalise", "replace", "mask", "keep"] = "penalise"
    """Completions cut off at the length limit. penalise: subtract eos_penalty from their reward. replace: eos_score is their
    reward (arXiv 2403.17031). mask: leave them out of the loss. keep: treat them like the others."""
    eos_penalty: NonNegativeFloat = 1.0
    """penalise: subtracted from the reward of a completion that was cut off."""
    eos_score: FiniteFloat = -1.0
    """replace: the reward of a completion that was cut off, below that of most others."""
    length_penalty: FiniteFloat = 0.0
    """Subtracted from the reward for every token; 0.001 to 0.01 if completions grow too long."""
    normalise: Literal["none", "running"] = "none"
    """running: divide rewards by their standard deviation over all rounds so far."""
    reward_clip: NonNegativeFloat = 0.0
    """Clip rewards to plus and minus this. 0: no clipping."""
    log_samples: NonNegativeInt = 2
    """Completions per round that are written to OUT/samples.jsonl."""
    eval_every: NonNegativeInt = 5
    """Rounds between evaluations on the held-out prompts of data.eval or data.eval_rows. 0: as train.eval_every says."""


@dataclass(frozen=True)
class PPOLossConfig:
    """The update: losses of policy and value function."""

    advantage: Literal["gae", "group", "rloo"] = "gae"
    """gae: from a value function (arXiv 1506.02438). group: reward relative to the samples of the same prompt (GRPO,
    2402.03300). rloo: relative to the other samples of the prompt (2402.14740)."""
    epochs: PositiveInt = 4
    """Passes over the completions of a round, 1 to 4."""
    clip: PositiveFloat = 0.2
    """Clip range of the ratio to the policy that sampled: 1 ± this."""
    clip_high: PositiveFloat | None = None
    """Clip-higher (DAPO, arXiv 2503.14476): the upper bound is 1 + this, 0.28 there. Default: clip."""
    ratio: Literal["token", "sequence"] = "token"
    """What the ratio is of. token: each token. sequence: the whole completion, its geometric mean over the tokens (GSPO, arXiv
    2507.18071); needs a clip range of about 4e-4."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """What a step's loss is divided by. token: its tokens (DAPO, arXiv 2503.14476). sequence: each completion by its tokens, then
    by the completions (GRPO, 2402.03300). constant: completions times sampling.max_new_tokens (Dr. GRPO, 2503.20783)."""
    reshuffle: bool = False
    """Put the prompts of a round into new minibatches in each epoch, not only the minibatches into a new order."""
    dual_clip: Annotated[float, Range(1, above=True, or_zero="off")] = 0.0
    """Dual clip, for negative advantages (arXiv 1912.09729): the loss of a token is at most this times |advantage|. Above
    1, usually 3; 0: off."""
    gamma: Annotated[float, Range(0, 1)] = 1.0
    """gae: discount factor."""
    gae_lambda: Annotated[float, Range(0, 1)] = 0.95
    """gae: lambda. 0: advantages from the next token's value alone. 1: from the rewards alone, less the value as baseline."""
    whiten: bool = True
    """gae: scale the advantages of a round to mean 0 and variance 1."""
    group_std: bool = True
    """group: divide by the standard deviation of a prompt's rewards. Off: Dr. GRPO (arXiv 2503.20783)."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    value_clip: NonNegativeFloat = 0.2
    """Clip range of the value around its estimate before the update. 0: no clipping."""
    kl: NonNegativeFloat = 0.05
    """Coefficient of the KL divergence from the reference: 0.01 (weak) to 0.2, relative to the scale of rewards."""
    kl_in: Literal["reward", "loss"] | None = None
    """reward: subtract it from each token's reward (estimator k1). loss: add it to the loss (k3, as in GRPO). Default:
    reward with gae, loss with group and rloo, which would compare its noise between the samples of a prompt."""
    kl_target: PositiveFloat | None = None
    """Adapt the coefficient towards this KL per completion, in nats (arXiv 1909.08593). Default: it is constant."""
    kl_horizon: PositiveInt = 10_000
    """kl_target: time scale of the adaptation, in completions."""
    target_kl: NonNegativeFloat = 0.0
    """Early stopping: end a round's epochs when the approx_kl of a step exceeds this, 0.02 to 0.1. 0: never."""
    entropy: FiniteFloat = 0.0
    """Weight of the entropy bonus, up to 0.01."""
    ptx_data: tuple[str, ...] = ()
    """PPO-ptx: rows of sft or plain text that are mixed into every step (arXiv 2203.02155)."""
    ptx_coef: NonNegativeFloat = 1.0
    """PPO-ptx: weight of their loss per token."""

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL divergence is a term of the loss, not of the rewards."""
        return (self.kl_in or ("reward" if self.advantage == "gae" else "loss")) == "loss"


@dataclass(frozen=True)
class ValueConfig:
    """The value function of gae: an adapter with a scalar head. It starts as a copy of the reward run if that is one run of
    the same adapter kind, else with a head of zeros."""

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    share: bool = False
    """Put the value head on the policy's adapter instead: half the computation, but both losses train one adapter."""
    learning_rate: PositiveFloat = 1.0
    """Learning rate of the value function, as a multiple of train.learning_rate."""


@dataclass(frozen=True)
class PPOConfig(RunConfig):
    """PPO: policy, reference, value function and reward model are adapters on one base."""

    reward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SPEC")] = ()
    """What scores the completions: [WEIGHT*]RUN for a reward run, or [WEIGHT*]FILE.py:NAME for a Python function of prompts
    and completions that returns numbers. Several: their weighted sum, with scores of reward runs standardised."""
    allow_training_spread: bool = False
    """In a sum of rewards, accept a reward run whose mean and spread were measured on the rows it was trained on."""
    reference: str = "start"
    """start: what the policy started from (--init, or the base). base: the base without adapters. Or a run or adapter folder."""
    sampling: Sampling = field(default_factory=Sampling)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOLossConfig = field(default_factory=PPOLossConfig)
    value: ValueConfig = field(default_factory=ValueConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.losses:
            raise UserError("--data.losses is about rows with answers; ppo samples its own")
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
            "--value.share": (not self.value.share or c.advantage == "gae", "off: only gae has a value function"),
            "--ppo.kl-target with --ppo.kl": (c.kl_target is None or c.kl > 0, "a coefficient to begin with, above 0"),
        }
        for flag, (valid, needed) in checks.items():
            if not valid:
                raise UserError(f"{flag} must be {needed}")
