"""Rewards of completions: reward runs on the base, Python functions, or a weighted sum of them.

In a sum, the scores of a reward run are standardised with the mean and spread on held-out data from its lowalign.json, so
that weights compare. The numbers of a function are used as they are.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowalign.data.chat import Chat
from lowalign.data.rows.turns import Prompt
from lowalign.errors import UserError
from lowalign.model.host import Host
from lowalign.rewards.function import FunctionReward, Samples, load_function
from lowalign.rewards.reward_run import TOKEN_BUDGET, Ids, RunReward, check_template, load_reward_run, mean_and_std
from lowalign.rewards.spec import FUNCTIONS, RewardSpec, parse_spec


@dataclass(frozen=True)
class CompletionScore:
    """The reward of a completion. parts: by name of the reward, before weighting."""

    total: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Rewards:
    """Rewards with their weights, by name (RewardSpec.name)."""

    parts: dict[str, tuple[float, FunctionReward | RunReward]]

    def __call__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Ids],
        completions: Sequence[Sequence[str]],
        completion_ids: Sequence[Sequence[Ids]],
        samples: Samples | None = None,
    ) -> list[list[CompletionScore]]:
        """For each prompt, the CompletionScore of each of its completions. completions, completion_ids: by prompt, as
        text and as sampled ids. samples: what else functions may ask for.

        Raises UserError when a function fails, or when the score of a reward run is not finite.
        """
        inputs = (prompts, prompt_ids, completions, completion_ids, samples)
        values = {name: reward(*inputs) for name, (_, reward) in self.parts.items()}
        return [[self._sum(values, i, j) for j in range(len(group))] for i, group in enumerate(completions)]

    def _sum(self, values: dict[str, list[list[float]]], i: int, j: int) -> CompletionScore:
        parts = {name: by_prompt[i][j] for name, by_prompt in values.items()}
        return CompletionScore(sum(self.parts[name][0] * value for name, value in parts.items()), parts)


@dataclass(frozen=True)
class RewardOptions:
    """How rewards are loaded. allow_training_spread: in a sum, accept a reward run whose mean and spread were measured on its
    training rows. token_budget: most tokens of a scoring forward."""

    allow_base_mismatch: bool = False
    allow_training_spread: bool = False
    token_budget: int = TOKEN_BUDGET


def load_functions(
    specs: Sequence[str], columns: Collection[str] | None = None, option: str = "--reward"
) -> dict[str, FunctionReward]:
    """The functions that the specs name, by RewardSpec.name. columns: of the prompts' rows; None where there are none. option:
    the flag, for messages.

    Raises UserError for a file that fails, and for a function that requires a parameter which is no column.
    """
    functions = {}
    for spec in _parsed(specs, option):
        if (given := FUNCTIONS.get(spec.name)) is not None:
            functions[spec.name] = FunctionReward.of(_source_file(given) or Path(spec.name), spec.name, given)
        elif (place := spec.function(option)) is not None:
            functions[spec.name] = load_function(*place)
    if columns is not None:
        for function in functions.values():
            function.check_columns(columns)
    return functions


def load_rewards(
    specs: Sequence[str],
    host: Host,
    chat: Chat | None,
    options: RewardOptions = RewardOptions(),
    functions: Mapping[str, FunctionReward] | None = None,
) -> Rewards:
    """Load what the specs name; reward runs go onto the host as reward0, reward1, …

    chat: of the completions to be scored; None when the specs name functions only. functions: of load_functions, where they
    are loaded already. Raises UserError for what cannot be loaded, and for a reward run without a head, with another chat
    template, or without the mean and spread that a sum needs.
    """
    parsed = _parsed(specs)
    functions = load_functions(specs) if functions is None else functions
    parts: dict[str, tuple[float, FunctionReward | RunReward]] = {}
    for i, spec in enumerate(parsed):
        if spec.name in functions:
            parts[spec.name] = spec.weight, functions[spec.name]
        else:
            stack = load_reward_run(host, f"reward{i}", spec.name, options.allow_base_mismatch)
            check_template(spec.name, chat)
            mean, std = mean_and_std(spec.name, options.allow_training_spread) if len(specs) > 1 else (0.0, 1.0)
            parts[spec.name] = spec.weight, RunReward(host, stack, chat, mean, std, options.token_budget)
    return Rewards(parts)


def _parsed(specs: Sequence[str], option: str = "--reward") -> list[RewardSpec]:
    """Raises UserError for a reward that is named twice."""
    parsed = [parse_spec(spec, option) for spec in specs]
    names = [spec.name for spec in parsed]
    if len(set(names)) < len(names):
        raise UserError(f"{option} names {next(n for n in names if names.count(n) > 1)} more than once")
    return parsed


def _source_file(function: Callable) -> Path | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # of a builtin or a callable object
        return None
    return Path(file) if file else None
