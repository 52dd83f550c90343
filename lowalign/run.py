"""From a configuration to a finished run: base, data, host, method, engine, and what is written down.

OUT/recipe.yaml        the whole configuration; rerunning it is the same run
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
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lowalign import recipe
from lowalign.config import DataConfig, TrainConfig
from lowalign.data.chat import Chat, load_chat
from lowalign.data.dataset import Dataset, load_examples, split_heldout
from lowalign.data.pack import Example, micro_batches
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
from lowalign.train import checkpoint
from lowalign.train.engine import Result, train
from lowalign.train.method import Method
from lowalign.train.signals import Interrupted, StopSignals
from lowalign.train.track import say
from lowalign.training import DPOConfig, RewardConfig, RunConfig, SFTConfig

QUALITY_ROWS = 1024  # rankings that a finished reward model is judged on

Stack = tuple[str, ...]


def sft(config: SFTConfig, base: Base | None = None) -> int:
    """Run `lowalign sft`; `base` is one that is loaded already. Returns the exit code."""

    def start(host: Host, rows: list[Example], heldout: list[Example], stack: Stack, reference: Stack) -> SFT:
        _check_start(host, stack, reference, rows, config)
        return SFT(host, rows, stack, config.train.batch_size, config.train.seed)

    return _run(config, "sft", load_examples, start, base)


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

    return _run(config, "reward", load, start, base, finish=_reward_quality)


def dpo(config: DPOConfig, base: Base | None = None) -> int:
    """Run `lowalign dpo`; `base` is one that is loaded already. Returns the exit code."""
    kto, settings = config.dpo.loss == "kto", config.train

    def load(*args: Any, **options: Any) -> Dataset:
        data = load_preferences(*args, **options)
        if not kto:
            _refuse_labels(data.examples, "they need --dpo.loss kto")
        return data

    def start(host: Host, rows: list[Example], heldout: list[Example], stack: Stack, reference: Stack) -> DPO | KTO:
        _check_start(host, stack, reference, rows, config)
        if config.reference != "start":
            reference = () if config.reference == "base" else load_stack(host, "reference", config.reference, config.allow_base_mismatch)  # fmt: skip
        if config.reference_cache == "on" and config.dpo.loss not in REFERENCE_FREE:
            with StopSignals() as stop:
                for part in (rows, heldout):
                    fill(host, reference, part, settings, stop)
        if kto:
            return KTO(
                host, rows, stack, reference, config.dpo, settings.batch_size, settings.seed, settings.token_budget
            )
        return DPO(host, rows, stack, reference, config.dpo, settings.batch_size, settings.seed)

    return _run(config, "dpo", load, start, base)


def _run(
    config: RunConfig,
    name: str,
    load: Callable[..., Dataset],
    start: Callable[..., Method],
    base: Base | None,
    finish: Callable[..., dict] | None = None,
) -> int:
    """What all methods share. load: files to Examples. start: the method on the host, before the first step. finish: what
    its adapter's lowalign.json is to say besides."""
    with checkpoint.lock(config.out):
        _write_recipe(config)
        # The rows first: what is wrong with them should not cost the loading of a 7B model.
        tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
        chat = load_chat(tokenizer, config.data.template)
        rows, heldout = _data(load, config.data, chat, tokenizer, config.out, config.train.seed)
        host = Host(base or _load(config))
        policy, reference = start_policy(
            host, config.adapter, config.init, config.init_mode, config.train.seed, config.allow_base_mismatch
        )
        try:
            method = start(host, rows, heldout, policy, reference)
        except Interrupted as stopped:
            say(f"stopped by {stopped.signal.name} before the first step; go on with the same command")
            return 128 + stopped.signal
        settings = replace(config.train, steps=_steps(config.train, len(rows)))
        result = train(host, method, settings, config.out, heldout=heldout, resume=config.resume)
        if result.stopped_by is not None:
            say(
                f"stopped by {result.stopped_by.name} after step {result.step}; go on with the same command and --resume"
            )
            return 128 + result.stopped_by
        more = finish(host, policy, heldout or rows, config) if finish else {}
        _save_adapter(host, policy, chat, config, result, name, more)
        for adapter in tuple(host.configs):
            host.delete(adapter)
    return 0


def _check_start(host: Host, policy: Stack, reference: Stack, rows: list[Example], config: RunConfig) -> None:
    if not checkpoint.steps(config.out):
        say(check_start(host, policy, reference, rows))


def _load(config: RunConfig) -> Base:
    base = config.base
    return Base.load(config.model, base.quantization, base.revision, base.dtype, base.device)


def _write_recipe(config: RunConfig) -> None:
    """Write OUT/recipe.yaml, or compare with the one a resumed run was started with."""
    file = config.out / "recipe.yaml"
    if config.resume and file.exists() and checkpoint.steps(config.out):
        changed = recipe.diff(recipe.parse(type(config), [], file), config)
        if changed:
            listed = "\n  ".join(changed)
            raise UserError(f"--resume goes on with the run in {config.out}, but these options differ from its recipe.yaml:\n  {listed}\n"
                            "Give the same options, or start anew in another --out")  # fmt: skip
    elif checkpoint.steps(config.out):
        raise UserError(
            f"{config.out} holds checkpoints of an earlier run: go on with --resume, or choose another --out"
        )
    file.write_text(recipe.dump(replace(config, resume=False)))


def _data(
    load: Callable[..., Dataset],
    config: DataConfig,
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    seed: int,
) -> tuple[list[Example], list[Example]]:
    """-> the examples to train on, and those held out; OUT/data_report.json is written."""
    if not config.files:
        raise UserError("no data: give --data FILE…")
    for name in ("rejected.jsonl", "rejected_eval.jsonl"):  # an earlier attempt's
        (out / name).unlink(missing_ok=True)
    read = partial(load, chat=chat, config=config, tokenizer=tokenizer)
    data = read(config.files, rejected=out / "rejected.jsonl")
    report = {"train": data.report}
    if config.eval:
        held = read(config.eval, heldout=True, rejected=out / "rejected_eval.jsonl")
        report["eval"] = held.report
        rows, heldout = data.examples, held.examples
    else:
        rows, heldout = split_heldout(data.examples, config.eval_rows, seed)
    for part in report.values():
        say("\n".join(describe(part)))
    (out / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")
    return rows, heldout


def _steps(config: TrainConfig, rows: int) -> int:
    return config.steps if config.steps is not None else max(1, math.ceil(config.epochs * rows / config.batch_size))


def _reward_quality(host: Host, policy: Stack, examples: list[Example], config: RewardConfig) -> dict[str, Any]:
    """What the scores are worth, on held-out rankings where there are some."""
    scores, order = [], []
    with torch.no_grad(), host.use(*policy):
        for group in micro_batches(examples[:QUALITY_ROWS], config.train.token_budget):
            scores += host.scores(group, policy[-1])
            order += group
    found = quality(scores, order)
    say("scores: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    return {"reward": found}


def _refuse_labels(examples: Sequence[Example], instead: str) -> None:
    """Raise UserError when there are rows with a thumb up or down and nothing to compare it with."""
    lone = [e for e in examples if e.rank is None]
    if lone:
        raise UserError(f"{len(lone):,} rows, the first {lone[0].source}, have a label and no rival: {instead}")


def _save_adapter(
    host: Host, policy: Stack, chat: Chat, config: RunConfig, result: Result, method: str, more: dict[str, Any]
) -> None:
    """OUT/adapter: what the run was for."""
    told = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    host.save(
        policy[-1],
        config.out / "adapter",
        parents=policy[:-1],
        files={"chat_template.jinja": chat.template},
        **more,
        method=method,
        step=result.step,
        metrics=told,
        recipe=recipe.dump(_without_paths(config, host.base.identity.name)),
    )
    say(f"the adapter is in {config.out / 'adapter'}")


def _without_paths(config: RunConfig, base: str) -> RunConfig:
    """The recipe as it may be published with the adapter: names of files, but not where they lie on this machine."""
    name = lambda path: Path(path).name if Path(path).exists() else str(path)  # noqa: E731  a Hub id stays as it is
    data = config.data
    files = {"files": tuple(map(name, data.files)), "eval": tuple(map(name, data.eval))}
    template = data.template and Path(data.template.name)
    return replace(
        config,
        model=base,
        out=Path(config.out.name),
        init=config.init and name(config.init),
        data=replace(data, **files, template=template),
    )
