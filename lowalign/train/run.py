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
import signal
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign import processes
from lowalign.config.sections import PromptFormat, TrainConfig
from lowalign.config.training import RunConfig
from lowalign.data.chat import Chat, load_chat
from lowalign.data.cleaning.report import cleaning_report
from lowalign.data.cleaning.text import cleaning_lines
from lowalign.data.dataset import Dataset, split_heldout
from lowalign.data.losses import filter_by_loss, filter_lines
from lowalign.data.mixture import MixedExamples, epoch_length, mixed
from lowalign.data.pack import Example
from lowalign.data.prompt_format import PROMPT_FORMAT, check_prompt_format
from lowalign.data.report import report_lines
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.log import duration, log
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.files import refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.base.device import device_of
from lowalign.model.base.hub import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.policy import Stack, check_start, load_stack, start_policy
from lowalign.model.positions import usable_positions
from lowalign.train import checkpoint
from lowalign.train.engine import OnStep, train
from lowalign.train.lock import lock_folder
from lowalign.train.method import Method
from lowalign.train.peak import Predict
from lowalign.train.result import choose, refuse_best_without_heldout
from lowalign.train.run_folder import (
    META,
    RECIPE_FILE,
    announce_start,
    check_or_write_inputs,
    flat_options,
    input_hashes,
    save_adapter,
)
from lowalign.train.signals import Interrupted
from lowalign.train.tracker import refuse_not_installed


@dataclass(frozen=True)
class RunRows:
    """The rows to train on, the held-out rows, and the formats of their prompts (lowalign.data.prompt_format)."""

    train: Sequence
    heldout: Sequence
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
    start: Callable[[Host, Sequence, Sequence, Stack, Stack], Method]
    data: Sequence[str] = ()
    adapters: Sequence[str] = ()
    steps: Callable[[int], int] | None = None
    finish: Callable[[Host, Stack, Sequence, Sequence, Any], dict] = lambda *_: {}


def run(
    config: RunConfig, job: Job, base: Base | None = None, on_step: OnStep | None = None, predict: Predict | None = None
) -> int:
    """A training run, from its configuration to the saved adapter. base: one that is already loaded. on_step: called after
    each step (lowalign.train.engine.train). predict: how many bytes a micro-batch takes at most. -> the exit code."""
    if not config.data.files:
        raise UserError("no data: give --data FILE…")
    refuse_best_without_heldout(config)
    refuse_not_installed(config.train.track)
    with processes.joined(), lock_folder(config.out), ExitStack() as cleanup:
        started = time.monotonic()
        announce_start(config.resume, config.out / RECIPE_FILE)
        device_of(config.base.device)
        adapters = [source for source in (config.init, *job.adapters) if source]
        if config.init and job.name != "reward":
            refuse_reward_runs([config.init])
        losses = [str(config.data.losses)] if config.data.losses else []
        inputs = input_hashes((*config.data.files, *config.data.eval, *losses, *job.data), adapters)
        check_or_write_inputs(config, bool(checkpoint.steps(config.out)), inputs)
        try:
            r = _started(config, job, adapters, base, cleanup)
        except (Interrupted, KeyboardInterrupt) as stopped:
            received = getattr(stopped, "signal", signal.SIGINT)
            log(
                f"stopped by {received.name} before the first step. Kept: checkpoints of an earlier start in {config.out}, and in "
                "the cache tokenized rows and the reference's log-probs. Go on with the same command and --resume"
            )
            return 128 + received
        epochs, size = config.train.epochs, config.train.batch_size
        count = job.steps(len(r.rows)) if job.steps else math.ceil(epochs * epoch_length(r.rows) / size)
        settings = replace(config.train, steps=config.train.steps or max(1, count))
        _announce_longer(config, settings)
        options = flat_options(config)
        more = {"resume": config.resume, "on_step": on_step, "options": options, "predict": predict}
        result = train(r.host, r.method, settings, config.out, heldout=r.heldout, **more)
        if result.stopped_by is not None:
            log(
                f"stopped by {result.stopped_by.name} after step {result.step}; go on with the same command and --resume"
            )
            return 128 + result.stopped_by
        shares = {name[6:]: value for name, value in result.metrics.items() if name.startswith("share/")}
        if shares:
            log("realised shares: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))
        if processes.is_main():
            chosen = choose(r.host, config, result)
            meta = r.meta | job.finish(r.host, r.policy, r.rows, r.heldout, config)
            save_adapter(r.host, r.policy, r.chat, config, chosen, meta, config.out / "adapter")
            log(f"{result.step:,} steps in {duration(started)}. Next: {_next_command(config, job.name)}")
            log(f"the adapter is in {config.out / 'adapter'}: {chosen.why}")
        processes.wait()
    return 0


@dataclass(frozen=True)
class _Started:
    """All that a run has before its first step. meta: of the adapter's lowalign.json, as far as it is known."""

    chat: Chat
    rows: Sequence
    heldout: Sequence
    host: Host
    policy: Stack
    method: Method
    meta: dict[str, Any]


def _started(config: RunConfig, job: Job, adapters: Sequence[str], base: Base | None, cleanup: ExitStack) -> _Started:
    """Rows, host, policy and method. The rows first: errors in them are reported before a large model is loaded.

    cleanup: takes the adapters off the base again, however the run ends: the caller may use it for another one.
    """
    tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
    chat = load_chat(tokenizer, config.data)
    chat.positions = usable_positions(*_source(config, base), adapters, config.adapter)
    with processes.main_first():  # it fills the cache of tokenized rows
        data = job.read(tokenizer, chat)
    meta = {"method": job.name, "prompt_format": _prompt_format(config, data.prompt_formats)}
    write_json(config.out / META, meta)
    host = Host(base or Base.load(config.model, **vars(config.base)))
    cleanup.callback(host.delete_all)
    policy, initial = start_policy(
        host, config.adapter, config.init, config.init_mode, config.train.seed, config.allow_base_mismatch
    )
    method = job.start(host, data.train, data.heldout, policy, initial)
    return _Started(chat, data.train, data.heldout, host, policy, method, meta)


def _announce_longer(config: RunConfig, settings: TrainConfig) -> None:
    """Of a finished run that goes on: what its learning rate does."""
    done = max(checkpoint.steps(config.out), default=0)
    if (
        config.resume
        and settings.schedule != "constant"
        and done < settings.steps
        and (config.out / "adapter").exists()
    ):
        log(
            f"the run was finished at step {done:,}, where its {settings.schedule} schedule ends; from here the learning rate is "
            f"that of {settings.steps:,} steps. Only a run with --train.schedule constant goes on as if it had been longer"
        )


def _next_command(config: RunConfig, method: str) -> str:
    """What one does with the result."""
    model, out = quote(config.model), quote(str(config.out))
    if method == "reward":
        policy = config.init and adapter_files.read_meta(adapter_files.locate(config.init)).get("method") != "reward"
        init = f" --init {quote(config.init)}" if policy else ""
        return f"lowalign ppo lora/ppo --model {model}{init} --reward {out} --data PROMPTS --out DIR"
    return f"lowalign generate --model {model} --adapter {out} --prompt TEXT, or lowalign report {out}"


def _source(config: RunConfig, base: Base | None) -> tuple[str, str | None]:
    """Where config.json of the base is: a folder or a Hub id, and its revision."""
    return (str(base.folder), None) if base else (config.model, config.base.revision)


def _prompt_format(config: RunConfig, formats: Collection[PromptFormat]) -> str | None:
    """What the adapter's lowalign.json says its prompts were: one format, "mixed", or for documents alone that of --init.

    Raises UserError when --init was trained on another format, unless --data.prompt-format is given.
    """
    trained = adapter_files.trained_format(config.init) if config.init else None
    if config.data.prompt_format is None:
        try:
            check_prompt_format(f"--init {config.init}", trained, formats)
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


def check_and_log_start(host: Host, policy: Stack, initial: Stack, rows: Sequence[Example], config: RunConfig) -> None:
    """Before the first step of a new run: compare the policy with what it started from, and log the result."""
    if not checkpoint.steps(config.out):
        log(check_start(host, policy, initial, rows))


def load_rows(
    config: RunConfig, load: Callable[..., Dataset], tokenizer: PreTrainedTokenizerBase, chat: Chat
) -> RunRows:
    """The Examples to train on and those held out. Writes OUT/data_report.json. load: files -> Dataset."""
    options, out = config.data, config.out
    for name in ("rejected.jsonl", "rejected_eval.jsonl") if processes.is_main() else ():  # of an earlier attempt
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
    rows, filtered = filter_by_loss(rows, options)
    rows = mixed(rows, options, config.train.seed)
    for part in report.values():
        log("\n".join([*report_lines(part), *(filter_lines(filtered) if part is data.report else ())]))
    if isinstance(rows, MixedExamples):
        log("\n".join(["mixture:", *rows.mixture.lines()]))
        data.report["mixture"] = dict(zip(rows.mixture.names, rows.mixture.shares, strict=True))
    formats = {name for part in report.values() for name in part["prompt_formats"]}
    if processes.is_main():
        cleaning = cleaning_report(rows, heldout, data, tokenizer)
        if lines := cleaning_lines(cleaning):
            log("\n".join(lines))
        write_json(out / "data_report.json", report | {"cleaning": cleaning, "filtered": filtered})
    return RunRows(rows, heldout, formats)
