"""From a configuration to a finished run: base, data, host, method, engine, and what is written down.

OUT/recipe.yaml        the whole configuration; rerunning it is the same run
OUT/inputs.json        input_hashes of the files and adapters it names
OUT/data_report.json   what was read, cut and dropped
OUT/metrics.jsonl      one line a step
OUT/checkpoints/       to resume from; best/ has the lowest held-out loss
OUT/adapter/           the adapter as stock peft reads it, its chat template, and lowalign.json
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.config.training import RunConfig
from lowalign.data.chat import Chat, load_chat
from lowalign.data.dataset import Dataset, split_heldout
from lowalign.data.pack import Example
from lowalign.data.report import report_lines
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.base.base import Base
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import check_start, load_stack, start_policy
from lowalign.train import checkpoint
from lowalign.train.engine import train
from lowalign.train.lock import lock_folder
from lowalign.train.method import Method
from lowalign.train.run_folder import check_or_write_inputs, input_hashes, save_adapter
from lowalign.train.signals import Interrupted

Stack = tuple[str, ...]
Read = Callable[[PreTrainedTokenizerBase, Chat], tuple[list, list]]


def run(
    config: RunConfig,
    name: str,
    read: Read,
    start: Callable[[Host, list, list, Stack, Stack], Method],
    base: Base | None,
    *,
    data: Sequence[str] = (),
    adapters: Sequence[str] = (),
    steps: Callable[[int], int] | None = None,
    finish: Callable[[Host, Stack, list, Any], dict] = lambda *_: {},
) -> int:
    """What all methods share. Returns the exit code.

    read: from tokenizer and template to the rows to train on and those held out. start: (host, rows, heldout, policy,
    reference) -> the method, before the first step. data, adapters: what it reads besides --data and --init. steps: how
    many for that many rows, where epochs do not tell. finish: (host, policy, rows, config) -> what the adapter's
    lowalign.json is to say besides.
    """
    with lock_folder(config.out):
        adapters = [source for source in (config.init, *adapters) if source]
        inputs = input_hashes((*config.data.files, *config.data.eval, *data), adapters)
        check_or_write_inputs(config, bool(checkpoint.steps(config.out)), inputs)
        # The rows first: what is wrong with them should not cost the loading of a 7B model.
        tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
        chat = load_chat(tokenizer, config.data.template)
        rows, heldout = read(tokenizer, chat)
        host = Host(base or Base.load(config.model, **vars(config.base)))
        policy, reference = start_policy(
            host, config.adapter, config.init, config.init_mode, config.train.seed, config.allow_base_mismatch
        )
        try:
            method = start(host, rows, heldout, policy, reference)
        except Interrupted as stopped:
            log(f"stopped by {stopped.signal.name} before the first step; go on with the same command")
            return 128 + stopped.signal
        count = steps(len(rows)) if steps else math.ceil(config.train.epochs * len(rows) / config.train.batch_size)
        loop = replace(config.train, steps=config.train.steps or max(1, count))
        result = train(host, method, loop, config.out, heldout=heldout, resume=config.resume)
        if result.stopped_by is not None:
            log(
                f"stopped by {result.stopped_by.name} after step {result.step}; go on with the same command and --resume"
            )
            return 128 + result.stopped_by
        save_adapter(host, policy, chat, config, result, name, finish(host, policy, heldout or rows, config))
        for adapter in tuple(host.adapters):
            host.delete(adapter)
    return 0


def named_run(reference: str) -> tuple[str, ...]:
    """The run that --reference names, if it names one."""
    return () if reference in ("start", "base") else (reference,)


def reference_stack(host: Host, named: str, started: Stack, allow_base_mismatch: bool) -> Stack:
    """The adapters that are the reference: what the policy started from, none (the bare base), or a run's."""
    if named == "start":
        return started
    return () if named == "base" else load_stack(host, "reference", named, allow_base_mismatch)


def check_and_log_start(host: Host, policy: Stack, reference: Stack, rows: list[Example], config: RunConfig) -> None:
    """At the beginning of a run, not where it goes on: check and tell how the policy stands to what it started from."""
    if not checkpoint.steps(config.out):
        log(check_start(host, policy, reference, rows))


def read_rows(
    config: RunConfig, load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerBase, chat: Chat
) -> tuple[list[Example], list[Example]]:
    """-> the examples to train on, and those held out; OUT/data_report.json is written. load: files to a Dataset."""
    options, out = config.data, config.out
    if not options.files:
        raise UserError("no data: give --data FILE…")
    for name in ("rejected.jsonl", "rejected_eval.jsonl"):  # an earlier attempt's
        (out / name).unlink(missing_ok=True)
    read = partial(load, chat=chat, config=options)
    data = read(options.files, rejected=out / "rejected.jsonl")
    report = {"train": data.report}
    if options.eval:
        held = read(options.eval, heldout=True, rejected=out / "rejected_eval.jsonl")
        report["eval"] = held.report
        rows, heldout = data.examples, held.examples
    else:
        rows, heldout = split_heldout(data.examples, options.eval_rows, config.train.seed)
    for part in report.values():
        log("\n".join(report_lines(part)))
    write_json(out / "data_report.json", report)
    return rows, heldout
