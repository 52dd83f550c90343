"""From a configuration to a finished run: base, data, host, method, engine, and what is written down.

OUT/recipe.yaml        the whole configuration; rerunning it is the same run
OUT/data_report.json   what was read, cut and dropped
OUT/metrics.jsonl      one line a step
OUT/checkpoints/       to resume from; best/ has the lowest held-out loss
OUT/adapter/           the adapter as stock peft reads it, its chat template, and lowalign.json
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lowalign import recipe
from lowalign.config import DataConfig, SFTConfig, TrainConfig
from lowalign.data.chat import Chat, load_chat
from lowalign.data.dataset import load_examples, split_heldout
from lowalign.data.pack import Example
from lowalign.data.report import describe
from lowalign.errors import UserError
from lowalign.methods.sft import SFT
from lowalign.model.base import Base
from lowalign.model.files import load_tokenizer
from lowalign.model.host import Host
from lowalign.model.start import check_start, start_policy
from lowalign.train import checkpoint
from lowalign.train.engine import Result, train
from lowalign.train.track import say


def sft(config: SFTConfig, base: Base | None = None) -> int:
    """Run `lowalign sft`; `base` is one that is loaded already. Returns the exit code."""
    with checkpoint.lock(config.out):
        _write_recipe(config)
        # The rows first: what is wrong with them should not cost the loading of a 7B model.
        tokenizer = base.tokenizer if base else load_tokenizer(config.model, config.base.revision)
        chat = load_chat(tokenizer, config.data.template)
        rows, heldout = _data(config.data, chat, tokenizer, config.out, config.train.seed)
        base = base or _load(config)
        host = Host(base)
        policy, reference = start_policy(
            host, config.adapter, config.init, config.init_mode, config.train.seed, config.allow_base_mismatch
        )
        method = SFT(host, rows, policy, config.train.batch_size, config.train.seed)
        if not checkpoint.steps(config.out):
            say(check_start(host, policy, reference, rows))
        settings = replace(config.train, steps=_steps(config.train, len(rows)))
        result = train(host, method, settings, config.out, heldout=heldout, resume=config.resume)
        if result.stopped_by is not None:
            say(
                f"stopped by {result.stopped_by.name} after step {result.step}; go on with the same command and --resume"
            )
            return 128 + result.stopped_by
        _save_adapter(host, policy, chat, config, result, "sft")
        for name in (*policy, *reference):
            if name in host.configs:
                host.delete(name)
    return 0


def _load(config: SFTConfig) -> Base:
    base = config.base
    return Base.load(config.model, base.quantization, base.revision, base.dtype, base.device)


def _write_recipe(config: SFTConfig) -> None:
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
    config: DataConfig, chat: Chat, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int
) -> tuple[list[Example], list[Example]]:
    """-> the examples to train on, and those held out; OUT/data_report.json is written."""
    if not config.files:
        raise UserError("no data: give --data FILE…")
    for name in ("rejected.jsonl", "rejected_eval.jsonl"):  # an earlier attempt's
        (out / name).unlink(missing_ok=True)
    read = partial(load_examples, chat=chat, config=config, tokenizer=tokenizer)
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


def _save_adapter(
    host: Host, policy: tuple[str, ...], chat: Chat, config: SFTConfig, result: Result, method: str
) -> None:
    """OUT/adapter: what the run was for."""
    told = {k: v for k, v in result.metrics.items() if math.isfinite(v)}
    host.save(
        policy[-1],
        config.out / "adapter",
        parents=policy[:-1],
        files={"chat_template.jinja": chat.template},
        method=method,
        step=result.step,
        metrics=told,
        recipe=recipe.dump(_without_paths(config, host.base.identity.name)),
    )
    say(f"the adapter is in {config.out / 'adapter'}")


def _without_paths(config: SFTConfig, base: str) -> SFTConfig:
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
