"""`lowalign eval --refusals`: how often the base and its adapters refuse the prompts of each file.

A run on refusal data should refuse harmful prompts more often, and harmless ones no more often than before (arXiv 2308.01263).
"""

import math
from collections.abc import Sequence
from typing import Any

from lowalign.commands.policies import Policy, PolicyAnswers, prompts_for
from lowalign.config.evaluation import EvalConfig
from lowalign.data.cleaning.words import refuses
from lowalign.data.prompts import PromptRow
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from lowalign.log import log, progress
from lowalign.model.host import Host
from lowalign.rewards.rewards import load_functions

PROMPTS_PER_BLOCK = 64
Z = 1.96  # of a 95 % interval


class Refusals:
    """Reads the prompts and the judge before the base is loaded; then measures."""

    def __init__(self, config: EvalConfig, policies: Sequence[Policy]) -> None:
        """Raises UserError for rows without a prompt, and for a judge that cannot be loaded."""
        self.config, self.policies = config, policies
        self.rows: dict[str, list[PromptRow]] = {
            file: [row for row, _ in prompts_for(policies, [file], config.data)] for file in config.data.files
        }
        self.judge = None
        if config.refusal_judge:
            (self.judge,) = load_functions([config.refusal_judge], option="--refusal-judge").values()
            if required := self.judge.parameters.required:
                raise UserError(
                    f"{self.judge.where} requires {required[0]}; a refusal judge gets prompts and completions"
                )

    def measure(self, host: Host) -> dict[str, dict[str, Any]]:
        """By policy, and by file: prompts, refused, rate and its 95 % interval (Wilson's). Writes the answers to --per-row."""
        config, rows = self.config, [row for own in self.rows.values() for row in own]
        answer = PolicyAnswers(host, self.policies, rows, 1, config.sampling, config.allow_base_mismatch)
        answered: list[dict[str, Any]] = []
        with progress(total=len(rows), unit="prompt") as bar:
            for start in range(0, len(rows), PROMPTS_PER_BLOCK):
                block = range(start, min(start + PROMPTS_PER_BLOCK, len(rows)))
                answered += answer(block)
                bar.update(len(block))
        results: dict[str, dict[str, Any]] = {}
        lines = []
        for k, policy in enumerate(self.policies):
            texts = [line["completions"][k]["completion"] for line in answered]
            refused = self._refused([row.prompt for row in rows], texts)
            rest = iter(refused)
            results[policy.name] = {file: _figures([next(rest) for _ in own]) for file, own in self.rows.items()}
            lines += [
                {"source": row.where, "policy": policy.name, "prompt": row.prompt, "completion": text, "refuses": r}
                for row, text, r in zip(rows, texts, refused, strict=True)
            ]
        if self.config.per_row:
            write_jsonl(self.config.per_row, lines)
            log(f"the answers are in {self.config.per_row}")
        return results

    def _refused(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[bool]:
        if self.judge is None:
            return [refuses(text) for text in texts]
        scores = self.judge(prompts, None, [[text] for text in texts], None)
        return [score >= 0.5 for (score,) in scores]


def refusal_table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A line for each policy, a column for each file."""
    files = list(next(iter(results.values())))
    cell = lambda own: f"{own['rate']:.1%} ({own['interval'][0]:.1%} to {own['interval'][1]:.1%})"  # noqa: E731
    return [["refused", *files], *([name, *(cell(own[file]) for file in files)] for name, own in results.items())]


def _figures(refused: Sequence[bool]) -> dict[str, Any]:
    n, hits = len(refused), sum(refused)
    rate, slack = hits / n, Z * Z / n
    middle = (rate + slack / 2) / (1 + slack)
    half = Z * math.sqrt(rate * (1 - rate) / n + slack / (4 * n)) / (1 + slack)
    return {"prompts": n, "refused": hits, "rate": rate, "interval": [max(0.0, middle - half), min(1.0, middle + half)]}
