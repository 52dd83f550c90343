"""The options of `lowalign plan`: those of the planned verb, and its own."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from lowalign.config.cards import card, memory
from lowalign.config.commands import BestOfNConfig
from lowalign.config.ranges import Checked, PositiveFloat, PositiveInt, Range
from lowalign.config.sections import OutDir
from lowalign.config.training import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from lowalign.config.yaml_flags import suggest, verb_in
from lowalign.errors import UserError


@dataclass(frozen=True)
class PlanOptions(Checked):
    """Predict memory, time and traffic of a run by a dry run of its own steps: no weights, no data, no GPU."""

    out: OutDir = Path()
    """Not used: nothing is trained."""
    length: Annotated[int, Range(2)] | None = None
    """Plan a micro-batch of one example of this many tokens, of prompt and completion, instead of data.max_length and
    train.token_budget. ppo: tokens of a prompt."""
    card: str = "RTX 4090"
    """The card that the time is predicted for, such as "RTX 3090", "L4" or "H100"; its memory, unless vram is given."""
    cards: PositiveInt = 1
    """Number of cards, each with a process of its own (torchrun): each holds the whole base, a step's examples are shared out.
    Not for best-of-n."""
    link_bandwidth: PositiveFloat = 20.0
    """With cards: GB/s between two of them, over which gradients are summed. 20: PCIe 4.0 x16; H100 with NVLink: about 400."""
    vram: str | None = None
    """Find the largest length and token budget that fit in this much memory: 24GB, 22.5GiB."""
    rank: bool = False
    """With vram: find the largest adapter.r as well."""
    write: Path | None = None
    """With vram: write a recipe that fits to this file."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        super().__post_init__()
        card(self.card)
        if self.vram is not None:
            memory(self.vram)
        elif self.rank or self.write:
            raise UserError(f"{'--rank' if self.rank else '--write'} goes with --vram: it says what has to fit")
        if self.rank and self.adapter.kind != "lora":
            raise UserError(f"--rank is for --adapter.kind lora; {self.adapter.kind} has no rank")


@dataclass(frozen=True)
class PlanSFTConfig(PlanOptions, SFTConfig):
    """Predict memory, time and traffic of `lowalign sft` by a dry run of its own steps: no weights, no data, no GPU."""


@dataclass(frozen=True)
class PlanRewardConfig(PlanOptions, RewardConfig):
    """Predict memory, time and traffic of `lowalign reward` by a dry run of its own steps: no weights, no data, no GPU."""


@dataclass(frozen=True)
class PlanDPOConfig(PlanOptions, DPOConfig):
    """Predict memory, time and traffic of `lowalign dpo` by a dry run of its own steps: no weights, no data, no GPU."""


@dataclass(frozen=True)
class PlanPPOConfig(PlanOptions, PPOConfig):
    """Predict memory, time and traffic of `lowalign ppo` by a dry run of its own steps: no weights, no data, no GPU."""


@dataclass(frozen=True)
class PlanBestOfNConfig(PlanOptions, BestOfNConfig):
    """Predict memory, time and traffic of `lowalign best-of-n` by a dry run of its own steps: no weights, no data, no GPU."""

    def __post_init__(self) -> None:
        if self.rank or self.write:
            raise UserError("--rank and --write are for commands that train; best-of-n samples and scores")
        super().__post_init__()


PLANNED = {
    "sft": (PlanSFTConfig, SFTConfig),
    "reward": (PlanRewardConfig, RewardConfig),
    "dpo": (PlanDPOConfig, DPOConfig),
    "ppo": (PlanPPOConfig, PPOConfig),
    "best-of-n": (PlanBestOfNConfig, BestOfNConfig),
}
"""By verb: the options of its plan, and its own."""


def plan_config(recipe: Path | None) -> type[PlanOptions]:
    """The options to parse for this recipe; without one, those for sft. Raises UserError for a verb that has no plan."""
    named = verb_in(recipe) if recipe else None
    if named and named[0] not in PLANNED:
        raise UserError(
            f"{recipe}:{named[1]}: plan is for {', '.join(PLANNED)}, not for {named[0]}{suggest(named[0], PLANNED)}"
        )
    return PLANNED[named[0] if named else "sft"][0]


def planned_verb(config: PlanOptions) -> str:
    """The verb that a plan is for."""
    return next(verb for verb, (plan, _) in PLANNED.items() if type(config) is plan)


def without_plan(config: PlanOptions) -> Any:
    """The options of the planned verb alone."""
    own = PLANNED[planned_verb(config)][1]
    return own(**{field.name: getattr(config, field.name) for field in fields(own)})
