"""A training run: data, base, host, method, engine, saved adapter.

OUT/recipe.yaml        the complete configuration, which reproduces the run
OUT/adapter_meta.json  what lowalign.json will say that is known before the first step, for `lowalign checkpoint`
OUT/inputs.json        hashes of the files and adapters that it names
OUT/data_report.json   rows read, truncated and dropped
OUT/metrics.jsonl      one line per step
OUT/checkpoints/       to resume from; best/ has the lowest held-out loss (ppo: the highest reward)
OUT/adapter/           the adapter (--train.result: the best or the last weights) in peft's format, its chat template, and lowalign.json
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.config.sections import PromptFormat
from lowalign.config.training import RunConfig
from lowalign.data.chat import Chat, load_chat
from lowalign.data.dataset import Dataset, split_heldout
from lowalign.data.pack import Example
from lowalign.data.prompt_format import check_prompt_format
from lowalign.data.report import report_lines
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.files import refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack, check_start, load_stack, start_policy
from lowalign.train import checkpoint
from lowalign.train.engine import train
from lowalign.train.lock import lock_folder
from lowalign.train.method import Method
from lowalign.train.result import choose, refuse_best_without_heldout
from lowalign.train.run_folder import META, check_or_write_inputs, input_hashes, save_adapter
from lowalign.train.signals import Interrupted

PROMPT_FORMAT = "--data.prompt-format"


@dataclass(frozen=True)
class RunRows:
    """The rows to train on, the held-out rows, and the formats of their prompts (lowalign.data.prompt_format)."""

    train: list
    heldout: list
    prompt_formats: Collection[PromptFormat]


@dataclass(frozen=True)
class Job:
    """What one command adds to the training run that all share.

    read: (tokenizer, chat) -> the rows. start: (host, rows, heldout, policy, initial: the stack that the policy started
    from) -> the method. data, adapters: what the command reads besides --data and
    --init. steps: number of rows -> optimizer steps; default: epochs × rows / batch size. finish: (host, policy, rows,
    heldout, config) -> additional entries for the adapter's lowalign.json.
    """

    name: str
    read: Callable[[PreTrainedTokenizerBase, Chat], RunRows]
    start: Callable[[Host, list, list, Stack, Stack], Method]
    data: Sequence[str] = ()
    adapters: Sequence[str] = ()
    steps: Callable[[int], int] | None = None
    finish: Callable[[Host, Stack, list, list, Any], dict] = lambda *_: {}


def run(config: RunConfig, job: Job, base: Base | None = None) -> int:
    """A training run, from its configuration to the saved adapter. base: one that is already loaded. -> the exit code."""
    if not config.data.files:
        raise UserError("no data: give --data FILE…")
    refuse_best_without_heldout(config)
    with lock_folder(config.out):
        adapters = [source for source in (config.init, *job.adapters) if source]
        if config.init and job.name != "reward":
            refuse_reward_runs([config.init])
        inputs = input_hashes((*config.data.files, *config.data.eval, *job.data), adapters)
        check_or_write_inputs(config, bool(checkpoint.steps(config.out)), inputs)
        # The rows first: errors in them are reported before a large model is loaded.
        tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
        chat = load_chat(tokenizer, config.data)
        data = job.read(tokenizer, chat)
        rows, heldout = data.train, data.heldout
        meta = {"method": job.name, "prompt_format": _prompt_format(config, data.prompt_formats)}
        write_json(config.out / META, meta)
        host = Host(base or Base.load(config.model, **vars(config.base)))
        policy, initial = start_policy(
            host, config.adapter, config.init, config.init_mode, config.train.seed, config.allow_base_mismatch
        )
        try:
            method = job.start(host, rows, heldout, policy, initial)
        except Interrupted as stopped:
            log(f"stopped by {stopped.signal.name} before the first step; go on with the same command")
            return 128 + stopped.signal
        epochs, size = config.train.epochs, config.train.batch_size
        count = job.steps(len(rows)) if job.steps else math.ceil(epochs * len(rows) / size)
        settings = replace(config.train, steps=config.train.steps or max(1, count))
        result = train(host, method, settings, config.out, heldout=heldout, resume=config.resume)
        if result.stopped_by is not None:
            log(
                f"stopped by {result.stopped_by.name} after step {result.step}; go on with the same command and --resume"
            )
            return 128 + result.stopped_by
        chosen = choose(host, config, result)
        meta |= job.finish(host, policy, rows, heldout, config)
        save_adapter(host, policy, chat, config, chosen, meta, config.out / "adapter")
        log(f"the adapter is in {config.out / 'adapter'}: {chosen.why}")
        for adapter in tuple(host.adapters):
            host.delete(adapter)
    return 0


def _prompt_format(config: RunConfig, formats: Collection[PromptFormat]) -> str | None:
    """What the adapter's lowalign.json says its prompts were: one format, "mixed", or for documents alone that of --init.

    Raises UserError when --init was trained on another format, unless --data.prompt-format is given.
    """
    trained = adapter_files.trained_format(config.init) if config.init else None
    if config.data.prompt_format is None:
        try:
            check_prompt_format(f"--init {config.init}", trained, formats, PROMPT_FORMAT)
        except UserError as error:
            raise UserError(f"{error}. {PROMPT_FORMAT} text or chat accepts both formats") from error
    return "mixed" if len(formats) > 1 else next(iter(formats), trained)


def reference_run(reference: str) -> tuple[str, ...]:
    """The run in --reference: empty for "start" and "base". Raises UserError for a reward run."""
    runs = () if reference in ("start", "base") else (reference,)
    refuse_reward_runs(runs)
    return runs


def reference_stack(host: Host, reference: str, initial: Stack, allow_base_mismatch: bool) -> Stack:
    """The adapters of --reference: those the policy started from ("start"), none ("base"), or those of a run."""
    if reference == "start":
        return initial
    return () if reference == "base" else load_stack(host, "reference", reference, allow_base_mismatch)


def check_and_log_start(host: Host, policy: Stack, initial: Stack, rows: list[Example], config: RunConfig) -> None:
    """Before the first step of a new run: compare the policy with what it started from, and log the result."""
    if not checkpoint.steps(config.out):
        log(check_start(host, policy, initial, rows))


def load_rows(
    config: RunConfig, load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerBase, chat: Chat
) -> RunRows:
    """The Examples to train on and those held out. Writes OUT/data_report.json. load: files -> Dataset."""
    options, out = config.data, config.out
    for name in ("rejected.jsonl", "rejected_eval.jsonl"):  # of an earlier attempt
        (out / name).unlink(missing_ok=True)
    read = partial(load, chat=chat, config=options)
    data = read(options.files, rejected=out / "rejected.jsonl")
    report = {"train": data.report}
    if options.eval:
        evaluation = read(options.eval, heldout=True, rejected=out / "rejected_eval.jsonl")
        report["eval"] = evaluation.report
        rows, heldout = data.examples, evaluation.examples
    else:
        rows, heldout = split_heldout(data.examples, options.eval_rows, config.train.seed)
    for part in report.values():
        log("\n".join(report_lines(part)))
    write_json(out / "data_report.json", report)
    return RunRows(rows, heldout, {name for part in report.values() for name in part["prompt_formats"]})
