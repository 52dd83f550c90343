"""Best-of-n: of n samples of a prompt, choose the one with the highest reward.

The mean reward of best-of-k, estimated without bias from n >= k samples with rewards r_(1) <= … <= r_(n): the mean of the
maximum over all subsets of k,

    E max = Σ_(i=k…n) C(i-1, k-1) / C(n, k) · r_(i)                     arXiv 2112.09332, appendix I

The KL divergence of best-of-k from the policy it samples from is at most

    KL = ln k - (k-1)/k                                                 arXiv 2009.01325, appendix G.3; 2401.01879
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lowalign.data.rows.turns import Prompt, unsupervised
from lowalign.durable import write_jsonl


def best(scores: Sequence[float], among: Iterable[int] | None = None) -> int | None:
    """Index of the highest score among these indices (all), the first of equals; None when there is none."""
    return max(range(len(scores)) if among is None else among, key=lambda i: (scores[i], -i), default=None)


def worst(scores: Sequence[float], among: Iterable[int] | None = None) -> int | None:
    """Index of the lowest score among these indices (all), the first of equals; None when there is none."""
    return min(range(len(scores)) if among is None else among, key=lambda i: (scores[i], i), default=None)


def ranks(scores: Sequence[float]) -> list[int]:
    """The rank of each score: 1 for the highest; equal scores share a rank, and the next lower score has the next number."""
    rank = {score: i for i, score in enumerate(sorted(set(scores), reverse=True), 1)}
    return [rank[score] for score in scores]


def distinct(items: Sequence[Hashable], among: Iterable[int]) -> list[int]:
    """The indices whose item did not occur at an earlier index."""
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
    """Upper bound of the KL divergence of best-of-k from the policy it samples from, in nats a completion."""
    return math.log(k) - (k - 1) / k


def sizes(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


# -- files and figures of a round ------------------------------------------------------------------------------------

# A line of candidates.jsonl: prompt, completions: [{completion, score, parts, stopped, tokens}].
CandidateLine = dict[str, Any]


def write_datasets(folder: Path, lines: Sequence[CandidateLine], unfinished: bool) -> dict[str, int]:
    """Write best.jsonl, pairs.jsonl and rankings.jsonl -> how many rows each has.

    unfinished: completions cut off at the length limit count like others. Else one is never better than another: it would
    be trained to end where it was cut. It may be the rejected one of a pair; a ranking has those that score below all
    finished ones, together on the last rank. Where a prompt is text, the rows are plain text, else turns of a chat. Blank
    completions are left out of all files, repeated ones count once, and equal scores make no pair.
    """
    rows: dict[str, list[dict]] = {"best": [], "pairs": [], "rankings": []}
    for line in lines:
        completions = line["completions"]
        prompt, plain = line["prompt"], isinstance(line["prompt"], str)
        texts, scores = [c["completion"] for c in completions], [c["score"] for c in completions]
        usable = distinct(texts, [i for i, text in enumerate(texts) if text.strip()])
        finished = [i for i in usable if unfinished or completions[i]["stopped"]]
        top = best(scores, finished)
        if top is not None:
            rows["best"].append(_sft_row(prompt, texts[top]))
            low = worst(scores, usable)
            if scores[low] < scores[top]:
                pair = {"chosen": _completion(texts[top], plain), "rejected": _completion(texts[low], plain)}
                rows["pairs"].append({"prompt": prompt, **pair})
            floor = min(scores[i] for i in finished)
            ranked = [i for i in usable if i in finished or scores[i] < floor]
            ranked_scores = [scores[i] if i in finished else -math.inf for i in ranked]
            if len(set(ranked_scores)) > 1:
                ranking = {"completions": [_completion(texts[i], plain) for i in ranked], "ranks": ranks(ranked_scores)}
                rows["rankings"].append({"prompt": prompt, **ranking})
    for name, part in rows.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    return {name: len(part) for name, part in rows.items()}


def report(lines: Sequence[CandidateLine]) -> dict[str, Any]:
    """The figures of a round, over all completions of its prompts.

    mean_reward: by k, expected_best averaged over the prompts. divergence: by k, kl_bound in nats. acceptance: share of
    prompts whose highest score is above that of the first sample. gain: highest minus mean score, averaged over the
    prompts. mean_length: in tokens. stopped: share of completions that ended before the length limit.
    """
    scores = [[c["score"] for c in line["completions"]] for line in lines]
    completions = [c for line in lines for c in line["completions"]]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    ks = sizes(len(scores[0]))
    return {
        "prompts": len(lines),
        "n": len(scores[0]),
        "mean_reward": {str(k): mean([expected_best(group, k) for group in scores]) for k in ks},
        "divergence": {str(k): kl_bound(k) for k in ks},
        "acceptance": mean([max(group) > group[0] for group in scores]),
        "gain": mean([max(group) - mean(group) for group in scores]),
        "mean_length": mean([c["tokens"] for c in completions]),
        "stopped": mean([c["stopped"] for c in completions]),
    }


def report_lines(figures: dict[str, Any]) -> list[str]:
    """The report, with the numbers of write_datasets, as text."""
    return [
        f"{figures['prompts']:,} prompts, {figures['n']:,} completions each",
        f"{'best of':>10}{'mean reward':>14}",
        *(f"{k:>10}{value:>14.4f}" for k, value in figures["mean_reward"].items()),
        f"the best beats the first sample on {figures['acceptance']:.1%} of the prompts, and the mean by {figures['gain']:.4f}",
        f"{figures['mean_length']:.1f} tokens a completion, {figures['stopped']:.1%} ended before the length limit",
        f"{figures['best']:,} rows in best.jsonl, {figures['pairs']:,} in pairs.jsonl, {figures['rankings']:,} in rankings.jsonl",
    ]


def _completion(text: str, plain: bool) -> Prompt:
    return text if plain else [{"role": "assistant", "content": text}]


def _sft_row(prompt: Prompt, text: str) -> dict[str, Any]:
    """A row of sft in which only the completion is supervised."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": text}
    return {"messages": [*unsupervised(prompt), *_completion(text, plain=False)]}
