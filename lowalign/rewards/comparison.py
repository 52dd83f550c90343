"""How policies compare: the figures of `lowalign compare` from verdicts on their answers, as JSON and as Markdown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from lowalign.errors import UserError
from lowalign.rewards import statistics
from lowalign.rewards.pairwise import EMPTY, SAME, Pair, VerdictLine
from lowalign.rewards.statistics import Estimate, Outcomes

# A verdict that changes with the order of the answers says nothing: a tie, as in arXiv 2306.05685, section 3.4.
OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5, "changed": 0.5}


@dataclass(frozen=True)
class Judged:
    """The answers of all policies and the verdicts on them. names: of the policies. n: answers of each to a prompt. Answer
    k·n + m of a row is number m of policy k. seed: of the bootstrap."""

    names: Sequence[str]
    n: int
    pairs: Sequence[Pair]
    lines: Sequence[VerdictLine]
    seed: int

    def outcomes(self) -> tuple[Outcomes, Counter[str]]:
        """-> the judged pairs, and how many were left out, by reason. Raises UserError when none was judged."""
        rows, left_out, prompts = [], Counter(), {}
        for pair, line in zip(self.pairs, self.lines, strict=True):
            a, b = pair.texts
            prompt = prompts.setdefault(id(pair.row), len(prompts))
            outcome = outcome_of(line, a, b)
            if outcome is None:
                left_out[line["why"]] += 1
            else:
                rows.append((outcome, len(a) - len(b), pair.i // self.n, pair.j // self.n, prompt))
        if not rows:
            raise UserError(f"no pair of answers could be judged: {'; '.join(left_out)}")
        return statistics.outcomes(rows, len(prompts)), left_out


def outcome_of(line: VerdictLine, a: str, b: str) -> float | None:
    """1 where answer a is better, 0 where b is, ½ for a tie; None for a pair that the judge could not read.

    An empty answer loses against another: leaving it out would favour the policy that gave it.
    """
    if line["verdict"] != "skipped":
        return OUTCOMES[line["verdict"]]
    if line["why"] in (EMPTY, SAME):
        return 0.5 + 0.5 * (bool(a.strip()) - bool(b.strip()))
    return None


def figures(judged: Judged) -> dict[str, Any]:
    """The figures of the first two policies; with more, `matches` of every two and `ratings` of all."""
    pairs, left_out = judged.outcomes()
    count = len(judged.names)
    matches = [_match(judged, pairs, i, j) for i, j in combinations(range(count), 2)]
    result = matches[0] | {"left_out": dict(left_out)}
    if count > 2:
        rated = statistics.estimates(pairs, partial(statistics.ratings, policies=count), judged.seed)
        ratings = [{"policy": name} | _named("rating", e) for name, e in zip(judged.names, rated, strict=True)]
        result |= {"matches": matches, "ratings": sorted(ratings, key=lambda r: -r["rating"])}
    return result


def _match(judged: Judged, pairs: Outcomes, i: int, j: int) -> dict[str, Any]:
    """Policy i against policy j."""
    own = pairs.between(i, j)
    names = {"a": judged.names[i], "b": judged.names[j]}
    if not len(own.outcome):
        raise UserError(f"no answers of {names['a']} and {names['b']} could be judged; see --max-length")
    (rate,) = statistics.estimates(own, statistics.win_rate, judged.seed)
    (controlled,) = statistics.estimates(own, statistics.length_controlled, judged.seed)
    changed = [
        line["verdict"] == "changed"
        for pair, line in zip(judged.pairs, judged.lines, strict=True)
        if (pair.i // judged.n, pair.j // judged.n) == (i, j)
    ]
    counts = Counter(own.outcome.tolist())
    return {
        **names,
        **_named("win_rate", rate, "interval"),
        **_named("length_controlled", controlled, "length_controlled_interval"),
        "wins": counts[1.0],
        "ties": counts[0.5],
        "losses": counts[0.0],
        "changed": sum(changed),
        "p_value": statistics.sign_test(*statistics.won_prompts(own)),
        "mean_length_difference": own.length.mean().item(),
    }


def _named(name: str, estimate: Estimate, interval: str = "interval") -> dict[str, Any]:
    return {name: estimate.value, interval: [estimate.low, estimate.high]}


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables, with a line on how to read them."""
    matches = result.get("matches", [result])
    lines = [
        f"# {result['a']} against {result['b']}" if len(matches) == 1 else "# Policies against each other",
        "",
        f"Prompts: {result['prompts']:,}. Answers of each policy to each: {result['n']:,}. Judge: {result['judge']}.",
        "",
        "| A | B | win rate of A | at equal length | wins | ties | losses | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in matches:
        rate = _percent(m["win_rate"], m["interval"])
        controlled = _percent(m["length_controlled"], m["length_controlled_interval"])
        counts = f"{m['wins']:,} | {m['ties']:,} | {m['losses']:,} | {m['p_value']:.2g}"
        lines.append(f"| {m['a']} | {m['b']} | {rate} | {controlled} | {counts} |")
    if "ratings" in result:
        lines += ["", "| policy | rating (Elo points) |", "|---|---|"]
        for r in result["ratings"]:
            low, high = r["interval"]
            lines.append(f"| {r['policy']} | {r['rating']:.0f} ({low:.0f} to {high:.0f}) |")
    lines += [
        "",
        "In brackets: 95 % intervals, by resampling prompts. A tie counts half. p: sign test over prompts.",
        *(f"{count:,} pairs were left out: {why}." for why, count in result["left_out"].items()),
    ]
    return "\n".join(lines) + "\n"


def _percent(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{value:.1%} ({low:.1%} to {high:.1%})"
