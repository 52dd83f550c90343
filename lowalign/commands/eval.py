"""`lowalign eval`: held-out loss, perplexity, reward accuracy and margins of several adapters, from one load of the base.

With --tasks the same adapters answer the benchmarks of lm-eval (lowalign/commands/lm_eval_host.py), with --refusals prompts
that they should refuse or should not (lowalign/commands/refusals.py). --per-row writes the loss of each row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lowalign.commands.policies import Policy, adapters_of, base_named_by, read_policies
from lowalign.commands.refusals import Refusals, refusal_table
from lowalign.config.evaluation import EvalConfig
from lowalign.data.any_rows import load_any
from lowalign.data.chat import Chat
from lowalign.data.losses import row_losses
from lowalign.data.pack import Example
from lowalign.data.preferences import refuse_labels
from lowalign.data.prompt_format import check_prompt_format
from lowalign.durable import write_json, write_jsonl
from lowalign.errors import UserError
from lowalign.log import aligned, log
from lowalign.methods.reward_model import scored
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.files import refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_stack
from lowalign.model.positions import usable_positions
from lowalign.rewards.heldout import PerCompletion, implicit_rewards, loss_figures, preference_figures, summed_logps
from lowalign.rewards.reward_run import score_examples

COLUMNS = {"loss": ".4f", "perplexity": ".3f", "accuracy": ".1%", "margin": ".4f", "tokens": ",", "pairs": ","}
LISTED = 5  # rows of the highest and of the lowest loss
Rows = dict[str, list[Example]]  # by file


def evaluate(config: EvalConfig, base: Base | None = None) -> int:
    """Run the command; `base` is one that is loaded already. Returns the exit code."""
    for flag, file in (("--out", config.out), ("--per-row", config.per_row)):
        if file and not file.resolve().parent.is_dir():
            raise UserError(f"{flag} {file}: there is no folder {file.parent}")
    run_tasks = _task_runner(config) if config.tasks else None
    model = base_named_by(config.model, config.adapter)
    # Errors in rows and adapters are found before a 7B model is loaded.
    tokenizer = base.tokenizer if base else load_tokenizer(model, config.base.revision)
    positions = usable_positions(base.folder if base else model, config.base.revision, config.adapter)
    policies = read_policies([*dict.fromkeys(("base", *config.adapter))], tokenizer, positions)
    if run_tasks or config.refusals:
        refuse_reward_runs(config.adapter)
    refusals = Refusals(config, policies) if config.refusals else None
    rows = {} if run_tasks or refusals else _read_rows(policies, config)
    host = Host(base or Base.load(model, **vars(config.base)))
    try:
        if refusals:
            results = refusals.measure(host)
            table = "\n".join(aligned(refusal_table(results)))
        else:
            table, results = _measure(host, policies, rows, config, run_tasks)
    finally:
        host.delete_all()
    print(table)
    if config.out:
        source = {"tasks": config.tasks.split(",")} if config.tasks else {"data": list(config.data.files)}
        write_json(config.out, {"model": host.base.identity.name, **source, "results": results})
        log(f"the figures are in {config.out}")
    return 0


def _measure(
    host: Host,
    policies: Sequence[Policy],
    rows: dict[int, Rows],
    config: EvalConfig,
    run_tasks: Callable[[Host, Stack, Chat], dict[str, Any]] | None,
) -> tuple[str, dict[str, dict[str, Any]]]:
    """-> the table, and the figures by name."""
    stacks = [
        load_stack(host, f"adapter{k}", policy.adapters[0], config.allow_base_mismatch) if policy.adapters else ()
        for k, policy in enumerate(policies)
    ]
    each = list(zip(policies, stacks, strict=True))
    if run_tasks:
        results = {policy.name: run_tasks(host, stack, policy.chat) for policy, stack in each}
        return _task_table(results), results
    measure = _Measurement(host, config)
    results = {policy.name: measure(policy.name, stack, rows[id(policy.chat)]) for policy, stack in each}
    if config.per_row:
        _write_losses(config.per_row, policies, rows, measure.logps)
    return _table(results), results


def _write_losses(
    file: Path, policies: Sequence[Policy], rows: dict[int, Rows], logps: dict[str, PerCompletion]
) -> None:
    """Write the loss of each row, and log the rows of the highest and lowest under the first policy."""
    lines: dict[str, dict[str, Any]] = {}
    for chat, files in rows.items():
        examples = [example for own in files.values() for example in own]
        own = {
            policy.name: logps[policy.name] for policy in policies if id(policy.chat) == chat and policy.name in logps
        }
        for line in row_losses(examples, own):
            lines.setdefault(line["source"], line)["loss"] |= line["loss"]
    write_jsonl(file, lines.values())
    first = policies[0].name
    ordered = sorted((line["loss"][first], line["source"]) for line in lines.values() if first in line["loss"])
    for word, part in (("highest", ordered[::-1]), ("lowest", ordered)):
        log(f"{word} loss under {first}: {', '.join(f'{source} {loss:.3f}' for loss, source in part[:LISTED])}")
    log(f"the losses of {len(lines):,} rows are in {file}")


def _read_rows(policies: Sequence[Policy], config: EvalConfig) -> dict[int, Rows]:
    """The rows as each chat template writes them, by id of the Chat."""
    adapters = adapters_of([policy.name for policy in policies])
    for adapter in adapters:  # to report errors in it now
        adapter_files.read(adapter_files.locate(adapter))
    option = config.data.prompt_format or adapter_files.common_format(adapters)
    options = replace(config.data, prompt_format=option)
    chats: dict[int, Chat] = {id(policy.chat): policy.chat for policy in policies}
    rows: dict[int, Rows] = {key: {} for key in chats}
    for key, file in product(chats, options.files):
        data = load_any(file, chats[key], options)
        refuse_labels([e for e in data.examples if e.label is not None], "eval compares answers to one prompt")
        for adapter in adapters:
            trained = adapter_files.trained_format(adapter)
            check_prompt_format(adapter, trained, data.report["prompt_formats"])
        rows[key][file] = list(data.examples)
    return rows


@dataclass
class _Measurement:
    """The figures of a policy or reward run on rows. The base's log-probs are computed once for the rows of a template."""

    host: Host
    config: EvalConfig

    def __post_init__(self) -> None:
        self._bare: dict[int, PerCompletion] = {}
        self.logps: dict[str, PerCompletion] = {}  # by policy

    def __call__(self, name: str, stack: Stack, rows: Rows) -> dict[str, Any]:
        """Of all rows, and by file under `sources`."""
        examples = [example for own in rows.values() for example in own]
        if stack and self.host.has_scalar_head(stack[-1]):
            cut = [scored(example) for example in examples]
            rewards, logps = score_examples(self.host, stack, cut, self.config.token_budget), None
        else:
            logps = self.logps[name] = self._logps(stack, examples)
            reference = self._logps((), examples) if stack and any(e.rank for e in examples) else None
            rewards = reference and implicit_rewards(logps, reference, self.config.beta)
        sources, start = {}, 0
        for file, own in rows.items():
            part = slice(start, start := start + len(own))
            sources[file] = _figures(own, logps and logps[part], rewards and rewards[part])
        return _figures(examples, logps, rewards) | {"sources": sources}

    def _logps(self, stack: Stack, examples: Sequence[Example]) -> PerCompletion:
        if stack:
            return summed_logps(self.host, stack, examples, self.config.token_budget)
        key = id(examples[0])
        if key not in self._bare:
            self._bare[key] = summed_logps(self.host, (), examples, self.config.token_budget)
        return self._bare[key]


def _figures(examples: Sequence[Example], logps: PerCompletion | None, rewards: PerCompletion | None) -> dict[str, Any]:
    """None for what was not measured."""
    empty: dict[str, Any] = dict.fromkeys(COLUMNS)
    measured = loss_figures(examples, logps) if logps else {}
    return empty | measured | (preference_figures(examples, rewards) if rewards else {})


def _table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each adapter and, where there are several files, for each of them."""
    lines = []
    for name, figures in results.items():
        lines.append((name, figures))
        if len(figures["sources"]) > 1:
            lines += [(f"  {file}", own) for file, own in figures["sources"].items()]
    used = [column for column in COLUMNS if any(figures[column] is not None for _, figures in lines)]
    cell = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    cells = [[name, *(cell(f[c], COLUMNS[c]) for c in used)] for name, f in lines]
    return "\n".join(aligned([["", *used], *cells]))


def _task_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line for each adapter and task, with its metrics."""
    lines = [["", "task", "metric", "value", "standard error"]]
    for name, tasks in results.items():
        for task, metrics in tasks.items():
            numbers = {k: v for k, v in metrics.items() if isinstance(v, float) and "_stderr," not in k}
            for key, value in numbers.items():
                error = metrics.get(key.replace(",", "_stderr,"))
                error = format(error, ".4f") if isinstance(error, float) else "-"
                lines.append([name, task, key.removesuffix(",none"), format(value, ".4f"), error])
    return "\n".join(aligned(lines))


def _task_runner(config: EvalConfig) -> Callable[[Host, Stack, Chat], dict[str, Any]]:
    """What runs the tasks. Raises UserError where lm-eval is not installed, and for tasks that it does not know."""
    try:
        from lowalign.commands.lm_eval_host import TaskRunner
    except ModuleNotFoundError as error:
        raise UserError(f"--tasks needs lm-eval ({error.name} is missing): pip install lowalign[eval]") from error
    return TaskRunner(config)
