"""What a policy is worth, by the world's own exact score: on held-out instructions, and against another policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.demo import world
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import load_stack
from lowalign.rewards.reward_run import load_reward_run, score_examples
from lowalign.rewards.selection import best

ASKED = 128  # held-out instructions a policy is measured on
SHOWN = 2
DRAW = Sampling(max_new_tokens=96, temperature=1.0, seed=1, max_rows=128)


@dataclass
class Measured:
    """How the answers to the held-out instructions did. scores: of each answer. kl: nats an answer from the SFT policy."""

    name: str
    scores: list[world.CardScore]
    kl: float | None = None
    answers: list[str] = field(default_factory=list)

    def mean(self, part: str) -> float:
        """The mean of a part of the world's score (or `total`), 0 to 1."""
        return sum(getattr(s, part) for s in self.scores) / len(self.scores)

    def against(self, other: "Measured") -> tuple[float, float]:
        """Win rate, and half its 95 % interval: each instruction is won, lost, or (equal scores) half won."""
        pairs = [(a.total, b.total) for a, b in zip(self.scores, other.scores, strict=True)]
        wins = [0.5 if math.isclose(a, b) else float(a > b) for a, b in pairs]
        mean = sum(wins) / len(wins)
        spread = math.sqrt(sum((w - mean) ** 2 for w in wins) / (len(wins) - 1))
        return mean, 1.96 * spread / math.sqrt(len(wins))


def measure(
    name: str,
    base: Base,
    chat: Chat,
    adapter: str | None,
    *,
    reference: str | None = None,
    n: int = 1,
    judge: str | None = None,
) -> Measured:
    """Sample an answer to each held-out instruction under this run, or the best of n as the reward run `judge` sees it,
    and score it by the rules of the world. reference: the run that the divergence is from."""
    host = Host(base)
    stack = load_stack(host, "policy", adapter) if adapter else ()
    asked = world.prompts(ASKED, seed=0, split="held_out")
    ids = [chat.prompt_ids(messages) for messages in asked]
    # Another seed for each policy, or policies that are alike would be compared by the very same luck.
    draw = replace(DRAW, seed=sum(map(ord, name)))
    with host.use(*stack):
        found = host.generate(ids, n, draw)
    if judge:
        scorer = load_reward_run(host, "judge", judge)
        values = score_examples(
            host, scorer, [Example(p, [c.ids for c in cs]) for p, cs in zip(ids, found, strict=True)]
        )
        chosen = [cs[best(v)] for cs, v in zip(found, values, strict=True)]
    else:
        chosen = [cs[0] for cs in found]
    kl = None
    if reference:
        examples = [Example(p, [c.ids]) for p, c in zip(ids, chosen, strict=True)]
        kl = completion_kl(host, stack, load_stack(host, "reference", reference), examples)
    for each in tuple(host.adapters):
        host.delete(each)
    answers = [base.tokenizer.decode(c.ids, skip_special_tokens=True) for c in chosen]
    scores = [world.score(m, text, c.stopped) for m, text, c in zip(asked, answers, chosen, strict=True)]
    shown = [f"{m[0]['content']}\n{indent(text)}" for m, text in zip(asked, answers, strict=True)]
    return Measured(name, scores, kl, shown[:SHOWN])


@torch.no_grad()
def completion_kl(host: Host, p: Sequence[str], q: Sequence[str], examples: Sequence[Example]) -> float:
    """KL(p ‖ q) of whole answers in nats, estimated on answers that were sampled from p."""
    sums = []
    for stack in (p, q):
        with host.use(*stack):
            sums.append(torch.stack([logp.sum() for (logp,) in host.logprobs(examples)]))
    return (sums[0] - sums[1]).mean().item()


def indent(text: str, width: int = 160) -> str:
    """An answer under its question, cut when it is long."""
    text = text if len(text) <= width else text[:width] + " …"
    return "\n".join("    " + line for line in text.splitlines())
