"""What a policy is worth: its answers to held-out instructions, scored by the exact rules of the world."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.demo import world
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import load_stack
from lowalign.rewards.rewards import load_rewards
from lowalign.rewards.selection import best

EVAL_PROMPTS = 96  # held-out instructions that a policy answers
PRINTED_ANSWERS = 2
# Many rows at a time: the 4-bit weights are dequantized once for all of them.
SAMPLING = Sampling(max_new_tokens=96, temperature=1.0, seed=1, max_rows=512, batch_tokens=65536)


@dataclass
class Evaluation:
    """Scores of a policy's answers, one per held-out instruction; kl: nats per answer from the SFT policy."""

    name: str
    scores: list[world.CardScore]
    kl: float | None = None
    answers: list[str] = field(default_factory=list)

    def mean(self, part: str) -> float:
        """The mean of a part of the world's score (or of `total`), 0 to 1."""
        return sum(getattr(s, part) for s in self.scores) / len(self.scores)

    def win_rate(self, other: "Evaluation") -> tuple[float, float]:
        """Share of instructions on which this policy scores higher (a tie counts half), and half its 95 % interval."""
        pairs = [(a.total, b.total) for a, b in zip(self.scores, other.scores, strict=True)]
        wins = [0.5 if math.isclose(a, b) else float(a > b) for a, b in pairs]
        mean = sum(wins) / len(wins)
        std = math.sqrt(sum((w - mean) ** 2 for w in wins) / (len(wins) - 1))
        return mean, 1.96 * std / math.sqrt(len(wins))


def evaluate(
    name: str,
    base: Base,
    chat: Chat,
    adapter: str | None,
    *,
    reference: str | None = None,
    n: int = 1,
    reward: str | None = None,
) -> Evaluation:
    """Sample an answer to each held-out instruction and score it by the rules of the world.

    adapter: the policy's run; None is the bare base. reference: the run that the KL is measured from.
    n, reward: of n answers the one is kept to which the reward run gives the highest score.
    """
    host = Host(base)
    policy = load_stack(host, "policy", adapter) if adapter else ()
    prompts = world.prompts(EVAL_PROMPTS, seed=0, split="held_out")
    ids = [chat.prompt_ids(messages) for messages in prompts]
    # A seed per policy: with one seed for all, similar policies would give the same answers and be hard to compare.
    sampling = replace(SAMPLING, seed=sum(map(ord, name)))
    with host.use(*policy):
        completions = host.generate(ids, n, sampling)
    if reward:
        decode = partial(base.tokenizer.decode, skip_special_tokens=True)
        texts = [[decode(c.ids) for c in group] for group in completions]
        rewards = load_rewards((reward,), host, chat)(prompts, ids, texts, [[c.ids for c in g] for g in completions])
        answers = [group[best([s.total for s in r])] for group, r in zip(completions, rewards, strict=True)]
    else:
        answers = [group[0] for group in completions]
    kl = None
    if reference:
        examples = [Example(p, [c.ids]) for p, c in zip(ids, answers, strict=True)]
        kl = completion_kl(host, policy, load_stack(host, "reference", reference), examples)
    host.delete_all()
    texts = [base.tokenizer.decode(c.ids, skip_special_tokens=True) for c in answers]
    scores = [world.score(p, text, c.stopped) for p, text, c in zip(prompts, texts, answers, strict=True)]
    shown = [format_answer(p, text) for p, text in zip(prompts, texts, strict=True)]
    return Evaluation(name, scores, kl, shown[:PRINTED_ANSWERS])


@torch.no_grad()
def completion_kl(host: Host, p: Sequence[str], q: Sequence[str], examples: Sequence[Example]) -> float:
    """KL(p ‖ q) of whole answers in nats, estimated on answers that were sampled from p."""
    sums = []
    for stack in (p, q):
        with host.use(*stack):
            sums.append(torch.stack([logp.sum() for (logp,) in host.logprobs(examples)]))
    return (sums[0] - sums[1]).mean().item()


def format_answer(messages: world.Messages, text: str, width: int = 160) -> str:
    """The instruction and, indented, the answer, cut after `width` characters."""
    text = text if len(text) <= width else text[:width] + " …"
    return "\n".join([messages[0]["content"], *("    " + line for line in text.splitlines())])
