"""Best-of-n: of n samples of a prompt, take the one with the highest reward. No gradient, only arithmetic.

The mean reward of best-of-k, estimated without bias from n >= k samples with rewards r_(1) <= … <= r_(n): the mean of the
maximum over all subsets of k,

    E max = Σ_(i=k…n) C(i-1, k-1) / C(n, k) · r_(i)                     arXiv 2112.09332, appendix I

The divergence of best-of-k from the policy it samples from is at most

    KL = ln k - (k-1)/k                                                 arXiv 2009.01325, appendix G.3; 2401.01879
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowalign.data.prompts import Prompt, as_messages
from lowalign.durable import write_jsonl


def best(scores: Sequence[float], among: Iterable[int] | None = None) -> int | None:
    """Index of the highest score, the first of equals; None where there is none. among: the indices to choose from."""
    return max(range(len(scores)) if among is None else among, key=lambda i: (scores[i], -i), default=None)


def worst(scores: Sequence[float], among: Iterable[int] | None = None) -> int | None:
    """Index of the lowest score, the first of equals; None where there is none. among: the indices to choose from."""
    return min(range(len(scores)) if among is None else among, key=lambda i: (scores[i], i), default=None)


def ranks(scores: Sequence[float]) -> list[int]:
    """For each score its rank: 1 for the highest, equals share one, the next lower score has the next number."""
    place = {score: i for i, score in enumerate(sorted(set(scores), reverse=True), 1)}
    return [place[score] for score in scores]


def distinct(items: Sequence[Hashable], among: Iterable[int]) -> list[int]:
    """Those of the indices that are the first with their item."""
    first: dict[Hashable, int] = {}
    for i in among:
        first.setdefault(items[i], i)
    return list(first.values())


def expected_best(scores: Sequence[float], k: int) -> float:
    """The unbiased estimate of the mean reward of best-of-k from these n >= k samples."""
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"best-of-{k} cannot be estimated from {n} samples")
    ordered = sorted(scores)
    return sum(math.comb(i, k - 1) * r for i, r in enumerate(ordered)) / math.comb(n, k)


def kl_bound(k: int) -> float:
    """The most that best-of-k diverges from the policy it samples from, in nats a completion."""
    return math.log(k) - (k - 1) / k


def sizes(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


# -- what scored completions come to ----------------------------------------------------------------------------------

Line = dict[str, Any]  # of candidates.jsonl: prompt, completions: [{completion, score, parts, stopped, tokens}]


def write_datasets(folder: Path, lines: Sequence[Line], unfinished: bool, raw: bool) -> dict[str, int]:
    """Write best.jsonl, pairs.jsonl and rankings.jsonl -> how many rows each has.

    unfinished: completions cut off at the length limit may be the best. raw: prompts are plain text, not what a user says.
    Blank completions are left out everywhere, repeated ones count once, and equal scores make no pair.
    """
    rows: dict[str, list[dict]] = {"best": [], "pairs": [], "rankings": []}
    for line in lines:
        found = line["completions"]
        texts, scores = [c["completion"] for c in found], [c["score"] for c in found]
        usable = distinct(texts, [i for i, text in enumerate(texts) if text.strip()])
        top = best(scores, [i for i in usable if unfinished or found[i]["stopped"]])
        if top is not None:
            rows["best"].append(_answered(line["prompt"], texts[top], raw))
            low = worst(scores, usable)
            if scores[low] < scores[top]:
                pair = {"chosen": _completion(texts[top], raw), "rejected": _completion(texts[low], raw)}
                rows["pairs"].append({"prompt": _prompt(line["prompt"], raw), **pair})
        places = ranks([scores[i] for i in usable])
        if len(set(places)) > 1:
            ranked = {"completions": [_completion(texts[i], raw) for i in usable], "ranks": places}
            rows["rankings"].append({"prompt": _prompt(line["prompt"], raw), **ranked})
    for name, found in rows.items():
        write_jsonl(folder / f"{name}.jsonl", found)
    return {name: len(found) for name, found in rows.items()}


def report(lines: Sequence[Line]) -> dict[str, Any]:
    """The figures of a round, over all completions of its prompts.

    mean_reward: by k, of the best of k, estimated without bias. divergence: by k, the most that best-of-k diverges from
    the policy, in nats. acceptance: share of prompts whose highest score beats that of the first sample. gain: highest
    score less mean score, averaged over the prompts. mean_length in tokens. stopped: share that ended by itself.
    """
    scores = [[c["score"] for c in line["completions"]] for line in lines]
    every = [c for line in lines for c in line["completions"]]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    ks = sizes(len(scores[0]))
    return {
        "prompts": len(lines),
        "n": len(scores[0]),
        "mean_reward": {str(k): mean([expected_best(group, k) for group in scores]) for k in ks},
        "divergence": {str(k): kl_bound(k) for k in ks},
        "acceptance": mean([max(group) > group[0] for group in scores]),
        "gain": mean([max(group) - mean(group) for group in scores]),
        "mean_length": mean([c["tokens"] for c in every]),
        "stopped": mean([c["stopped"] for c in every]),
    }


def choice_lines(told: dict[str, Any]) -> list[str]:
    """The report in lines of text."""
    lines = [f"{told['prompts']:,} prompts, {told['n']:,} completions each", f"{'best of':>10}{'mean reward':>14}"]
    lines += [f"{k:>10}{value:>14.4f}" for k, value in told["mean_reward"].items()]
    return [
        *lines,
        f"the best beats the first sample on {told['acceptance']:.1%} of the prompts, and the mean by {told['gain']:.4f}",
        f"{told['mean_length']:.1f} tokens a completion, {told['stopped']:.1%} stop by themselves",
        f"{told['best']:,} rows in best.jsonl, {told['pairs']:,} in pairs.jsonl, {told['rankings']:,} in rankings.jsonl",
    ]


def _prompt(prompt: Prompt, raw: bool) -> Prompt:
    return prompt if raw else as_messages(prompt)


def _completion(text: str, raw: bool) -> Prompt:
    return text if raw else [{"role": "assistant", "content": text}]


def _answered(prompt: Prompt, text: str, raw: bool) -> dict[str, Any]:
    """A row of sft in which nothing but the completion is learnt."""
    if raw:
        return {"prompt": prompt, "completion": text}
    asked = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in as_messages(prompt)]
    return {"messages": [*asked, *_completion(text, raw)]}
