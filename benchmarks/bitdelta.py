"""BitDelta on a full fine-tune of the demo's base: `python benchmarks/bitdelta.py --out DIR`.

The fine-tune is made with plain torch. Measured: KL and held-out loss before and after distillation, the task's score
(the exact rules of the demo's world) with 95 % intervals, size on disk, memory of several deltas on one base. CPU, one thread, a
few minutes.
"""

import argparse
import math
import random
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowalign import Base, Host
from lowalign.commands import bitdelta as commands
from lowalign.commands.bitdelta import distil
from lowalign.config.bitdelta import DistilConfig, DistilTrainConfig
from lowalign.config.sections import BaseConfig, DataConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.demo import world
from lowalign.demo.configs import BASE, write
from lowalign.demo.evaluation import EVAL_PROMPTS, SAMPLING
from lowalign.export.bitdelta import compress, size_line
from lowalign.methods.bitdelta import BitDeltaDistillation, Fidelity, fidelity
from lowalign.model.forward.logprob import LMHead
from lowalign.model.policy import load_stack
from lowalign.train.teacher_states import teacher_states

STEPS = 150  # of the distillation
FP32 = BaseConfig(dtype="float32")
ON_16_BIT = BaseConfig(quantization="none", dtype="float32")


class PaperLoss(BitDeltaDistillation):
    """The loss of eq. 5: the squared difference of logits, summed over the vocabulary."""

    def loss(self, examples, normalizers):
        with self.host.use(*self.stack):
            states = torch.cat(self.host.states(examples))
            target = torch.cat([self.teacher(e) for e in examples]).to(states)
            head = LMHead.of(self.host.base.model)
            loss = (head.logits(states) - head.logits(target)).square().sum() / normalizers["tokens"]
        return loss, {"loss": loss.detach()}


def best_answers(n: int, seed: int, split: str = "train") -> list[dict]:
    """Rows of instructions with the best of four ranked answers: the task is to write cheerful cards."""
    return [
        {"messages": [*row["prompt"], {"role": "assistant", "content": row["completions"][0]}]}
        for row in world.ranking_rows(n, seed, split)
    ]


def calibration_rows(n: int) -> list[dict]:
    """Half of the rows as in training; the other half on the places that no training row names, in training phrasings. So
    calibration covers the places that are evaluated, and no instruction that is."""
    rng, others = random.Random(0), best_answers(n // 2, seed=7, split="held_out")
    for row in others:
        text = rng.choice(world.PHRASINGS).format(world.requested_place(row["messages"][:1]))
        row["messages"][0] = {"role": "user", "content": text}
    return best_answers(n // 2, seed=7) + others


def fine_tune(out: Path, seed: int, steps: int = 200, batch_size: int = 16, learning_rate: float = 2e-3) -> Path:
    """Every weight of the demo's base trained on the best answers, with transformers and torch alone, saved in bf16."""
    torch.manual_seed(seed)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, trust_remote_code=False),
        AutoTokenizer.from_pretrained(BASE, trust_remote_code=False),
    )
    rows = [row["messages"] for row in best_answers(1120, seed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = [rows[i] for i in torch.randint(len(rows), (batch_size,)).tolist()]
        ids, labels = [], []
        for messages in batch:
            whole = tokenizer.apply_chat_template(messages, return_dict=False)[
                :-1
            ]  # without the newline after the turn
            prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            ids.append(torch.tensor(whole))
            labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
        pad = lambda parts, value: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)  # noqa: E731
        x, y = pad(ids, 0), pad(labels, -100)
        loss = model(input_ids=x, attention_mask=(y != -100).long() | (x != 0).long(), labels=y).loss
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def task_score(base: Base, adapter: str | None) -> list[float]:
    """For each held-out instruction the mean score of two answers."""
    host, chat = Host(base), Chat(base.tokenizer)
    base.end_at(chat.end_of_turn)
    stack = load_stack(host, "delta", adapter) if adapter else ()
    prompts = world.prompts(EVAL_PROMPTS, seed=0, split="held_out")
    with host.use(*stack):
        answers = host.generate([chat.prompt_ids(m) for m in prompts], 2, SAMPLING)
    for name in tuple(host.adapters):
        host.delete(name)
    text = lambda completion: base.tokenizer.decode(completion.ids, skip_special_tokens=True)  # noqa: E731
    return [
        sum(world.score(p, text(c), c.stopped).total for c in row) / len(row)
        for p, row in zip(prompts, answers, strict=True)
    ]


def fidelities(base: Base, adapter: str | None, fine: Path, files: tuple[str, ...]) -> list[Fidelity]:
    """Of each row of the files. adapter None: of a base that has the fine-tune's LM head."""
    host, chat = Host(base), Chat(base.tokenizer)
    rows = load_examples(files, chat, DataConfig(cache=False)).examples
    teacher = teacher_states(str(fine), rows, ON_16_BIT)
    stack = load_stack(host, "delta", adapter) if adapter else ()
    found = [fidelity(host, stack, [row], teacher, 4096) for row in rows]
    for name in tuple(host.adapters):
        host.delete(name)
    return found


@torch.no_grad()
def of_the_base(base: Base, fine: Base, files: tuple[str, ...]) -> list[Fidelity]:
    """Of the base without a delta, whose LM head is not the fine-tune's: from the logits of both models."""
    found = []
    for e in load_examples(files, Chat(base.tokenizer), DataConfig(cache=False)).examples:
        ids, keep = torch.tensor([e.prompt + e.completions[0]]), torch.tensor(e.mask(0))
        start = len(e.prompt) - 1
        logp, logq = (m.model(ids).logits[0, start:-1].log_softmax(-1)[keep] for m in (fine, base))
        kl = (logp.exp() * (logp - logq)).sum(-1).mean().item()
        loss = [-x.gather(1, ids[0, start + 1 :, None][keep]).mean().item() for x in (logq, logp)]
        found.append(Fidelity(len(logp), kl, loss[0], loss[1], loss[0]))
    return found


def interval(values: list[float], weights: list[float] | None = None, digits: int = 3) -> str:
    """Weighted mean and its 95 % bootstrap interval over the rows or instructions."""
    x, w = torch.tensor(values, dtype=torch.float64), torch.tensor(weights or [1.0] * len(values), dtype=torch.float64)
    picks = torch.randint(len(x), (4000, len(x)), generator=torch.Generator().manual_seed(0))
    means = (x * w)[picks].sum(1) / w[picks].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{(x * w).sum() / w.sum():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_row(name: str, found: list[Fidelity], scores: list[float] | None) -> None:
    """KL and loss on held-out rows, and the task's score."""
    tokens = [f.tokens for f in found]
    kl, loss = interval([f.kl for f in found], tokens, 4), interval([f.delta for f in found], tokens)
    print(f"| {name} | {kl} | {loss} | {interval(scores) if scores else ''} |", flush=True)


def distilled(out: Path, delta: Path, fine: Path, rows: str, base: Base, config: BaseConfig) -> str:
    """A distillation with the packaged settings -> its run."""
    train = DistilTrainConfig(steps=STEPS, log_every=50, checkpointing="off")
    data = DataConfig(files=(rows,), cache=False)
    assert not distil(DistilConfig(str(BASE), out, str(delta), str(fine), data, train, config), base)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an existing fine-tune in it is used")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, fine = arguments.out, arguments.out / "fine"
    out.mkdir(parents=True, exist_ok=True)
    if not fine.exists():
        fine_tune(fine, arguments.seed)
    calibration = write(out / "calibration.jsonl", calibration_rows(512))
    heldout = (write(out / "held_out.jsonl", best_answers(64, seed=0, split="held_out")),)

    nf4, whole = Base.load(BASE, **vars(FP32), quiet=True), Base.load(BASE, **vars(ON_16_BIT), quiet=True)
    tuned = {q: Base.load(fine, quantization=q, dtype="float32", quiet=True) for q in ("none", "nf4")}
    print("| | KL(fine-tune ‖ ·) | held-out loss | task score |\n|---|---|---|---|")
    print_row("base, NF4", of_the_base(nf4, tuned["none"], heldout), task_score(nf4, None))
    print_row("fine-tune, 16 bit", fidelities(tuned["none"], None, fine, heldout), task_score(tuned["none"], None))
    print_row("fine-tune, NF4", fidelities(tuned["nf4"], None, fine, heldout), task_score(tuned["nf4"], None))
    for name, base, config, options in (
        ("NF4, onto dequantized", nf4, FP32, {}),
        ("NF4, onto dequantized, per row", nf4, FP32, {"per_row": True}),
        ("NF4, onto original, per row", nf4, FP32, {"onto": "original", "per_row": True}),
        ("16 bit, onto original, per row", whole, ON_16_BIT, {"onto": "original", "per_row": True}),
    ):
        delta, run = out / f"{name} delta", out / f"{name} run"
        for folder in (delta, run):
            shutil.rmtree(folder, ignore_errors=True)
        report = compress(str(BASE), str(fine), delta, **options)
        print_row(f"delta: {name}", fidelities(base, str(delta), fine, heldout), task_score(base, str(delta)))
        distilled(run, delta, fine, calibration, base, config)
        print_row("… distilled", fidelities(base, str(run), fine, heldout), task_score(base, str(run)))
    run, delta = out / "paper run", out / "NF4, onto dequantized, per row delta"
    shutil.rmtree(run, ignore_errors=True)
    commands.BitDeltaDistillation = PaperLoss
    distilled(run, delta, fine, calibration, nf4, FP32)
    print_row(
        "NF4, onto dequantized, per row, distilled with the loss of eq. 5",
        fidelities(nf4, str(run), fine, heldout),
        task_score(nf4, str(run)),
    )
    print(size_line(report))


if __name__ == "__main__":
    main()
