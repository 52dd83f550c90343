"""`lowalign bitdelta compress` and `lowalign bitdelta distil`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowalign.config.bitdelta import CompressConfig, DistilConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.export import bitdelta as export
from lowalign.log import log
from lowalign.methods.bitdelta import BitDeltaDistillation, Fidelity, Teacher, fidelity
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.bitdelta import BitDelta
from lowalign.model.base.base import Base
from lowalign.model.base.hub import BASE_FILES, resolve
from lowalign.model.host import Host
from lowalign.model.policy import Stack
from lowalign.train.run import Job, RunRows, check_and_log_start, load_rows, run
from lowalign.train.teacher_states import teacher_states

EVALUATED_ROWS = 256  # most rows that a delta is compared with the fine-tuned model on


def compress(config: CompressConfig) -> int:
    """Run `lowalign bitdelta compress`. Returns the exit code."""
    if not config.data.files:
        export.compress(config.base, config.finetuned, config.out, onto=config.onto, per_row=config.per_row)
        return 0
    compressed = config.out / "compressed"
    if config.out.exists() and not config.resume:
        raise UserError(f"{config.out} exists: go on with --resume, or name another folder with --out")
    if not compressed.exists():
        export.compress(config.base, config.finetuned, compressed, onto=config.onto, per_row=config.per_row)
    return distil(config.distillation(compressed))


def distil(config: DistilConfig, base: Base | None = None) -> int:
    """Run `lowalign bitdelta distil`; `base` is one that is loaded already. Returns the exit code."""
    stored, meta = adapter_files.read(adapter_files.locate(config.delta))
    if stored.kind is not BitDelta:
        raise UserError(f"--delta {config.delta} is a {stored.kind.peft_type} adapter; `lowalign bitdelta compress` makes a delta")  # fmt: skip
    if not stored.config.matrices:
        raise UserError(f"--delta {config.delta} has no scales to train: no linear layer of the fine-tune changed")
    teacher: Teacher
    before: Fidelity

    def read(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> RunRows:
        nonlocal teacher
        data = load_rows(config, load_examples, tokenizer, chat)
        data = replace(data, train=list(data.train), heldout=list(data.heldout))  # a state belongs to an Example
        if uneven := next((e.source for e in (*data.train, *data.heldout) if e.token_weights), None):
            raise UserError(
                f'{uneven}: a turn has a "weight" that is neither 0 nor 1; bitdelta distil cannot weigh turns'
            )
        # Now, so that the fine-tuned model is not in memory together with the base.
        options = replace(config.base, quantization=config.teacher_quantization, revision=None)
        teacher = teacher_states(config.finetuned, [*data.train, *data.heldout], options)
        return data

    def measured(host: Host, policy: Stack, rows: Sequence[Example]) -> Fidelity:
        return fidelity(host, policy, rows[:EVALUATED_ROWS], teacher, config.train.token_budget)

    def start(host: Host, rows: Sequence[Example], heldout: Sequence[Example], policy: Stack, initial: Stack):
        nonlocal before
        check_and_log_start(host, policy, initial, rows, config)
        for name in initial:  # a second copy of what is trained
            host.delete(name)
        before = measured(host, policy, heldout or rows)
        return BitDeltaDistillation(host, rows, policy, config.train, teacher)

    def finish(
        host: Host, policy: Stack, rows: Sequence[Example], heldout: Sequence[Example], _: Any
    ) -> dict[str, Any]:
        after = measured(host, policy, heldout or rows)
        report = meta.get("bitdelta", {}) | _report(before, after)
        on = "held-out" if heldout else "training"
        log("\n".join(_lines(report, on)))
        return {"bitdelta": report | {"rows": on}}

    weights = [str(file) for file in sorted(resolve(config.finetuned, None, BASE_FILES)[0].glob("*.safetensors"))]
    return run(config, Job("bitdelta", read, start, data=weights, finish=finish), base)


def _report(before: Fidelity, after: Fidelity) -> dict[str, Any]:
    loss = {"base": after.base, "finetuned": after.finetuned, "delta_before": before.delta, "delta": after.delta}
    return {"tokens": after.tokens, "kl": {"before": before.kl, "after": after.kl}, "loss": loss}


def _lines(report: dict[str, Any], on: str) -> list[str]:
    kl, loss = report["kl"], report["loss"]
    return [
        *([export.size_line(report)] if "bytes" in report else []),
        f"KL(fine-tuned ‖ delta) on {report['tokens']:,} tokens of {on} rows: {kl['before']:.4f} nats a token before the "
        f"distillation, {kl['after']:.4f} after it, {kl['before'] / max(kl['after'], 1e-12):.1f} times less",
        f"loss: base {loss['base']:.4f}, fine-tuned {loss['finetuned']:.4f}, delta {loss['delta_before']:.4f} before and "
        f"{loss['delta']:.4f} after",
    ]
