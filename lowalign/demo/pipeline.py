"""The demo: its pipeline, what each policy is worth, and the table of what each stage gained."""

import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowalign.commands.run import run
from lowalign.data.chat import Chat
from lowalign.demo import configs, world
from lowalign.demo.configs import BASE, BASE_CONFIG, BEST_OF
from lowalign.demo.evaluation import EVAL_PROMPTS, SAMPLING, Evaluation, evaluate, format_answer
from lowalign.model.base.base import Base, quiet_transformers
from lowalign.rewards.selection import kl_bound


def run_demo(out: Path) -> int:
    """The stages of `pipelines/demo` on one 4-bit base that is loaded once, then their evaluation. -> the exit code."""
    started, cpu_started = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)  # a model this small is slower on several
    base = Base.load(BASE, **vars(BASE_CONFIG))
    if code := run(configs.demo_pipeline(out), base):
        return code
    print_table(evaluations(base, out), out)
    kl = json.loads((out / "pipeline.json").read_text())["stages"]["merge"]["figures"]["kl"]
    print(f"\n--- answers of the merged model in plain transformers (KL to dpo {kl:.0e} nats a token)")
    print(plain_answer(out / "merge", world.prompts(1, seed=0, split="held_out")[0]))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    print(f"\n{seconds:.0f} s, {cpu_seconds:.0f} s of CPU; all files are in {out}, with a page about them: report.html")
    return 0


def evaluations(base: Base, out: Path) -> list[Evaluation]:
    """Of the base and of each policy, with the first answers printed."""
    chat, sft = Chat(base.tokenizer), str(out / "sft")
    policies = {
        "base": {"adapter": None},
        "sft": {"adapter": sft},
        f"best-of-{BEST_OF}": {"adapter": sft, "n": BEST_OF, "reward": str(out / "reward")},
        "dpo": {"adapter": str(out / "dpo"), "reference": sft},
        "ppo": {"adapter": str(out / "ppo"), "reference": sft},
    }
    made = []
    for name, options in policies.items():
        made.append(evaluate(name, base, chat, **options))
        made[-1].kl = kl_bound(BEST_OF) if "n" in options else made[-1].kl
        print(f"\n--- answers of {name}", *made[-1].answers, sep="\n", flush=True)
    return made


def plain_answer(folder: Path, messages: world.Messages) -> str:
    """The likeliest answer of a model folder, with nothing of lowalign."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=SAMPLING.max_new_tokens, do_sample=False)[0]
    return format_answer(messages, tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def held_out_losses(run: Path) -> tuple[float, float]:
    """Held-out loss before the first and after the last step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    return losses[0], losses[-1]


def print_table(evaluations: list[Evaluation], out: Path) -> None:
    """Print what each stage gained."""
    before, after = held_out_losses(out / "sft")
    metrics = json.loads((out / "reward" / "adapter" / "lowalign.json").read_text())["reward"]
    print(f"\nSFT, held-out loss: {before:.3f} -> {after:.3f}")
    print(f"reward model, held-out rankings: {metrics['accuracy']:.1%} of {metrics['pairs']} pairs in the right order")
    print(f"\nmeans over {EVAL_PROMPTS} instructions with places and phrasings that are in no training row,")
    print("scored by the exact rules of the world (wins with 95 % intervals)")
    heads = (f"{'names the place':>16}{'stops in time':>15}{'cheerful':>10}", f"{'reward':>8}{'wins over sft':>18}")
    print(f"{'':12}{''.join(heads)}{'KL to sft':>11}")
    sft_evaluation = next(e for e in evaluations if e.name == "sft")
    for e in evaluations:
        rate, half_width = e.win_rate(sft_evaluation)
        wins = "" if e is sft_evaluation else f"{rate:.0%} ± {half_width:.0%}"
        bound = "≤ " if e.name.startswith("best-of") else ""  # log n - (n-1)/n, for every reward
        kl = "" if e.kl is None else f"{bound}{e.kl:.1f} nats"
        print(
            f"{e.name:12}{e.mean('place'):>16.0%}{e.mean('stopped'):>15.0%}"
            f"{e.mean('cheerful'):>10.2f}{e.mean('total'):>8.2f}{wins:>18}{kl:>11}"
        )
