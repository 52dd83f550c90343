"""From a configuration to a finished run: base, data, host, method, engine, and what is written down.

OUT/recipe.yaml        the whole configuration; rerunning it is the same run
OUT/inputs.json        fingerprints of the files and adapters it names
OUT/data_report.json   what was read, cut and dropped
OUT/metrics.jsonl      one line a step
OUT/checkpoints/       to resume from; best/ has the lowest held-out loss
OUT/adapter/           the adapter as stock peft reads it, its chat template, and lowalign.json
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowalign.data.chat import Chat, load_chat
from lowalign.data.dataset import Dataset, load_examples, split_heldout
from lowalign.data.pack import Example
from lowalign.data.preferences import load_preferences
from lowalign.data.report import describe
from lowalign.errors import UserError
from lowalign.methods.dpo import DPO, REFERENCE_FREE
from lowalign.methods.kto import KTO
from lowalign.methods.reward import Reward, quality, scored
from lowalign.methods.sft import SFT
from lowalign.model.base import Base
from lowalign.model.files import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.start import check_start, load_stack, start_policy
from lowalign.reference import fill
from lowalign.rewards import score_examples
from lowalign.run_folder import begin, fingerprints, save_adapter
from lowalign.say import say
from lowalign.train import checkpoint
from lowalign.train.engine import train
from lowalign.train.method import Method
from lowalign.train.signals import Interrupted, StopSignals
from lowalign.training import DPOConfig, RewardConfig, RunConfig, SFTConfig

QUALITY_ROWS = 1024  # rankings that a finished reward model is judged on

Stack = tuple[str, ...]
Read = Callable[[PreTrainedTokenizerBase, Chat], tuple[list, list]]


def sft(config: SFTConfig, base: Base | None = None) -> int:
    """Run `lowalign sft`; `base` is one that is loaded already. Returns the exit code."""

    def start(host: Host, rows: list[Example], heldout: list[Example], stack: Stack, reference: Stack) -> SFT:
        say_start(host, stack, reference, rows, config)
        return SFT(host, rows, stack, config.train.batch_size, config.train.seed)

    return run(config, "sft", partial(read_rows, config, load_examples), start, base)


def reward(config: RewardConfig, base: Base | None = None) -> int:
    """Run `lowalign reward`; `base` is one that is loaded already. Returns the exit code."""

    def load(*args: Any, **options: Any) -> Dataset:
        data = load_preferences(*args, **options)
        _refuse_labels(
            data.examples, "a reward model learns from comparisons; use them with `lowalign dpo --dpo.loss kto`"
        )
        return replace(data, examples=[scored(e) for e in data.examples])

    def start(host: Host, rows: list[Example], heldout: list[Example], stack: Stack, reference: Stack) -> Reward:
        if not host.has_head(stack[-1]):
            host.add_head(stack[-1])
        ties = config.data.ties == "keep"
        return Reward(host, rows, stack, config.reward, config.train.batch_size, config.train.seed, ties)

    return run(config, "reward", partial(read_rows, config, load), start, base, finish=_reward_quality)


def dpo(config: DPOConfig, base: Base | None = None) -> int:
    """Run `lowalign dpo`; `base` is one that is loaded already. Returns the exit code."""
    kto, settings = config.dpo.loss == "kto", config.train

    def load(*args: Any, **options: Any) -> Dataset:
        data = load_preferences(*args, **options)
        if not kto:
            _refuse_labels(data.examples, "they need --dpo.loss kto")
        return data

    def start(host: Host, rows: list[Example], heldout: list[Example], stack: Stack, reference: Stack) -> DPO | KTO:
        say_start(host, stack, reference, rows, config)
        reference = reference_stack(host, config.reference, reference, config.allow_base_mismatch)
        if config.reference_cache == "on" and config.dpo.loss not in REFERENCE_FREE:
            with StopSignals() as stop:
                for part in (rows, heldout):
                    fill(host, reference, part, settings, stop)
        if kto:
            return KTO(
                host, rows, stack, reference, config.dpo, settings.batch_size, settings.seed, settings.token_budget
            )
        return DPO(host, rows, stack, reference, config.dpo, settings.batch_size, settings.seed)

    return run(config, "dpo", partial(read_rows, config, load), start, base, adapters=named_run(config.reference))


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
    with checkpoint.lock(config.out):
        adapters = [source for source in (config.init, *adapters) if source]
        inputs = fingerprints((*config.data.files, *config.data.eval, *data), adapters)
        begin(config, bool(checkpoint.steps(config.out)), inputs)
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
            say(f"stopped by {stopped.signal.name} before the first step; go on with the same command")
            return 128 + stopped.signal
        count = steps(len(rows)) if steps else math.ceil(config.train.epochs * len(rows) / config.train.batch_size)
        loop = replace(config.train, steps=config.train.steps or max(1, count))
        result = train(host, method, loop, config.out, heldout=heldout, resume=config.resume)
        if result.stopped_by is not None:
            say(
                f"stopped by {result.stopped_by.name} after step {result.step}; go on with the same command and --resume"
            )
            return 128 + result.stopped_by
        save_adapter(host, policy, chat, config, result, name, finish(host, policy, heldout or rows, config))
        for adapter in tuple(host.configs):
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


def say_start(host: Host, policy: Stack, reference: Stack, rows: list[Example], config: RunConfig) -> None:
    """At the beginning of a run, not where it goes on: check and tell how the policy stands to what it started from."""
    if not checkpoint.steps(config.out):
        say(check_start(host, policy, reference, rows))


def read_rows(
    config: RunConfig, load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerBase, chat: Chat
) -> tuple[list[Example], list[Example]]:
    """-> the examples to train on, and those held out; OUT/data_report.json is written. load: files to a Dataset."""
    options, out = config.data, config.out
    if not options.files:
        raise UserError("no data: give --data FILE…")
    for name in ("rejected.jsonl", "rejected_eval.jsonl"):  # an earlier attempt's
        (out / name).unlink(missing_ok=True)
    read = partial(load, chat=chat, config=options, tokenizer=tokenizer)
    data = read(options.files, rejected=out / "rejected.jsonl")
    report = {"train": data.report}
    if options.eval:
        held = read(options.eval, heldout=True, rejected=out / "rejected_eval.jsonl")
        report["eval"] = held.report
        rows, heldout = data.examples, held.examples
    else:
        rows, heldout = split_heldout(data.examples, options.eval_rows, config.train.seed)
    for part in report.values():
        say("\n".join(describe(part)))
    (out / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")
    return rows, heldout


def _reward_quality(host: Host, policy: Stack, examples: list[Example], config: RewardConfig) -> dict[str, Any]:
    """What the scores are worth, on held-out rankings where there are some."""
    examples = examples[:QUALITY_ROWS]
    scores = score_examples(host, policy, examples, config.train.token_budget)
    found = quality([torch.tensor(values) for values in scores], examples)
    say("scores: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return {"reward": found}


def _refuse_labels(examples: Sequence[Example], instead: str) -> None:
    """Raise UserError when there are rows with a thumb up or down and nothing to compare it with."""
    lone = [e for e in examples if e.rank is None]
    if lone:
        raise UserError(f"{len(lone):,} rows, the first {lone[0].source}, have a label and no rival: {instead}")
