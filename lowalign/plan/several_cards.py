"""What several cards mean for a plan. Each holds the base and all adapters, computes its share of a step's examples, and sums
the gradients of the adapters with the others."""

from dataclasses import replace
from typing import Any

from lowalign.config.cards import Card
from lowalign.config.training import PPOConfig, RunConfig
from lowalign.plan.figures import Figures
from lowalign.plan.verbs import Config


def share(config: Config, cards: int) -> Config:
    """The options of the card with the most of a step's examples (ppo: and of a round's prompts), all of one length."""
    if cards == 1 or not isinstance(config, RunConfig):
        return config
    own = -(-config.train.batch_size // cards)
    whole, train = config.train.batch_size, replace(config.train, batch_size=own)
    if isinstance(config, PPOConfig):
        rollout = replace(config.rollout, prompts=config.rollout.prompts // whole * own)
        return replace(config, train=train, rollout=rollout)
    return replace(config, train=train)


def all_reduce_seconds(figures: Figures, cards: int, bandwidth: float) -> float:
    """Time of a step (ppo: of a round) to sum the fp32 gradients over all cards: in a ring each sends 2 (N-1)/N of their bytes
    (Patarasuk and Yuan 2009). bandwidth: GB/s of the link between two cards."""
    sums = sum(phase.repeats for phase in figures.phases if phase.name == "optimizer step")
    return sums * 2 * (cards - 1) / cards * 4 * figures.trained / (bandwidth * 1e9)


def timing(figures: Figures, card: Card, config: Config, cards: int, bandwidth: float) -> dict[str, Any]:
    """The keys of `lowalign plan --json` that are about several cards. figures: of a card's share. config: of the whole run."""
    communication = all_reduce_seconds(figures, cards, bandwidth)
    seconds = figures.seconds(card) + communication
    batch = config.train.batch_size if isinstance(config, RunConfig) else 1
    tokens = figures.tokens * batch / -(-batch // cards)
    return {
        "cards": cards,
        "examples_per_card": -(-batch // cards),
        "all_reduce_seconds": round(communication, 4),
        "step_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
    }
