"""PPO in the tiny world: exact reward, KL and pretraining loss over seeds and variants.

    python benchmarks/ppo_world.py --out ppo_world --seeds 3 [--variants gae no-kl ptx …] [--vary-runs]

Makes the SFT and the reward run of `lowalign demo` once (with --vary-runs for each seed, which then is that of their data,
weights and order too), then one PPO run a variant and seed, and writes OUT/runs.json and OUT/ppo_world.svg. A run takes one
to two minutes; those that are in runs.json already are skipped.

Variants: gae, the demo's PPO in ten rounds, and the same with one thing changed: no-kl, ptx, group, rloo, group-k1 and rloo-k1
(with the KL in the reward); and base-lora, base-prompt, base-prefix: a fresh adapter of that kind on the bare base, with the
exact score of the world as reward.
"""

import argparse
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from lowalign import Base, Host
from lowalign.commands.ppo import ppo
from lowalign.commands.reward import reward
from lowalign.commands.sft import sft
from lowalign.config.training import PPOConfig
from lowalign.data.chat import Chat
from lowalign.demo import configs as demo
from lowalign.demo import world
from lowalign.demo.evaluation import EVAL_PROMPTS, SAMPLING, evaluate
from lowalign.model.policy import load_stack

FROM_BASE = {"base-lora": 2e-3, "base-prompt": 0.1, "base-prefix": 0.1}  # their learning rates
VARIANTS = ("gae", "no-kl", "ptx", "group", "rloo", "group-k1", "rloo-k1", *FROM_BASE)
COLOURS = {"gae": "#1f77b4", "no-kl": "#d62728", "ptx": "#2ca02c"}


def variant(config: PPOConfig, name: str, seed: int, pages: Path) -> PPOConfig:
    """The demo's PPO in ten rounds, changed in one thing."""
    loop = {"steps": 40, "batch_size": 16, "learning_rate": 2e-3, "schedule": "constant", "clip": 1.0, "seed": seed}
    config = replace(config, rollout=replace(config.rollout, prompts=32), train=replace(config.train, **loop))
    config = replace(config, sampling=replace(config.sampling, seed=seed))
    if name == "no-kl":
        return replace(config, ppo=replace(config.ppo, kl=0.0))
    if name == "ptx":
        return replace(config, ppo=replace(config.ppo, ptx_data=(str(pages),), ptx_coef=1.0))
    if name in ("group", "rloo"):
        return replace(config, ppo=replace(config.ppo, advantage=name))
    if name in ("group-k1", "rloo-k1"):
        return replace(config, ppo=replace(config.ppo, advantage=name.removesuffix("-k1"), kl_in="reward"))
    if rate := FROM_BASE.get(name):
        return replace(
            config,
            init=None,
            reward=(f"{Path(__file__).resolve()}:by_the_rules",),
            adapter=replace(config.adapter, kind=name.removeprefix("base-")),
            train=replace(config.train, learning_rate=rate, steps=64),
            value=replace(config.value, learning_rate=6e-3 / rate),
            ppo=replace(config.ppo, kl=0.05),
        )
    return config


def by_the_rules(prompts: list, completions: list[str]) -> list[float]:
    """The exact score, as a reward; answers that are cut off are penalised by PPO itself."""
    return [world.score(p, c, stopped=True).total for p, c in zip(prompts, completions, strict=True)]


@torch.no_grad()
def page_loss(base: Base, chat: Chat, adapter: Path) -> float:
    """Loss per token on held-out pages of the world."""
    host = Host(base)
    stack = load_stack(host, "policy", str(adapter))
    pages = [chat.document(page) for page in world.pretraining_text(48, seed=99)]
    with host.use(*stack):
        logps = torch.cat([logp for row in host.logprobs(pages, supervised_only=True) for logp in row])
    for name in tuple(host.adapters):
        host.delete(name)
    return -logps.sum().item() / sum(page.supervised for page in pages)


@torch.no_grad()
def end_shares(base: Base, chat: Chat, adapter: Path) -> dict[str, float]:
    """Share of sampled answers to held-out instructions by the token they end with; "cut off" for the length limit."""
    host = Host(base)
    stack = load_stack(host, "policy", str(adapter))
    ids = [chat.prompt_ids(messages) for messages in world.prompts(EVAL_PROMPTS, seed=0, split="held_out")]
    with host.use(*stack):
        samples = [c for group in host.generate(ids, 1, SAMPLING) for c in group]
    for name in tuple(host.adapters):
        host.delete(name)
    ends = Counter(base.tokenizer.convert_ids_to_tokens(c.ids[-1]) if c.stopped else "cut off" for c in samples)
    return {token: count / len(samples) for token, count in ends.items()}


def one(name: str, seed: int, base: Base, chat: Chat, prepared: Path, out: Path) -> dict:
    """One PPO run: reward and KL of its rounds, and the exact score of its policy."""
    folder = out / f"{name}-{seed}"
    config = variant(replace(demo.stage_config(prepared, "ppo"), out=folder), name, seed, prepared / "pages.jsonl")
    if code := ppo(replace(config, resume=folder.exists()), base):
        raise SystemExit(code)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sft_run = None if name in FROM_BASE else str(prepared / "sft")
    start = evaluate("sft" if sft_run else "base", base, chat, sft_run)
    end = evaluate(name, base, chat, str(folder), reference=sft_run)
    rate, half_width = end.win_rate(start)
    return {
        "variant": name,
        "seed": seed,
        "reward": [line["reward"] for line in log],
        "kl": [line["kl"] for line in log],
        "score": end.mean("total"),
        "start_score": start.mean("total"),
        "place": end.mean("place"),
        "wins": rate,
        "half_width": half_width,
        "final_kl": log[-1]["kl"] if end.kl is None else end.kl,
        "page_loss": page_loss(base, chat, folder),
        "ends": end_shares(base, chat, folder),
    }


def plot(runs: list[dict], file: Path) -> None:
    """Write reward and KL over the rounds as SVG, one line for each seed."""
    width, height, left = 340, 220, 50
    parts = []
    for k, (key, title) in enumerate((("reward", "reward (as the reward model sees it)"), ("kl", "KL to SFT, nats an answer"))):  # fmt: skip
        shown = [r for r in runs if r["variant"] in COLOURS]
        top, low = max(max(r[key]) for r in shown), min(min(r[key]) for r in shown)
        x0 = left + k * (width + 2 * left)
        parts.append(f'<text x="{x0}" y="20">{title}</text>')
        parts.append(f'<rect x="{x0}" y="30" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        for value, y in ((top, 40), (low, 30 + height)):
            parts.append(f'<text x="{x0 - 6}" y="{y}" text-anchor="end">{value:.1f}</text>')
        for r in shown:
            step = width / max(1, len(r[key]) - 1)
            points = [
                f"{x0 + i * step:.1f},{30 + height * (top - v) / ((top - low) or 1):.1f}" for i, v in enumerate(r[key])
            ]
            parts.append(f'<polyline fill="none" stroke="{COLOURS[r["variant"]]}" points="{" ".join(points)}"/>')
        parts.append(f'<text x="{x0 + width}" y="{height + 46}" text-anchor="end">round</text>')
    for i, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{left + 90 * i}" y="{height + 66}" fill="{colour}">{name}</text>')
    size = f'width="{2 * width + 4 * left}" height="{height + 80}"'
    body = "\n".join(parts)
    file.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n')  # fmt: skip


def ends(runs: list[dict]) -> list[str]:
    """The tokens that answers of these runs end with."""
    return sorted({token for r in runs for token in r["ends"]})


def prepare(made: Path, base: Base, seed: int) -> Path:
    """Make the SFT and the reward run of the demo with this seed, if they are not there, and the pages -> `made`."""
    made.mkdir(parents=True, exist_ok=True)
    for train, config, rows in (
        (sft, demo.stage_config(made, "sft"), world.sft_rows(1120, seed=seed)),
        (reward, demo.stage_config(made, "reward"), world.ranking_rows(768, seed=seed)),
    ):
        demo.write(Path(config.data.files[0]), rows)
        if not (config.out / "adapter").exists():
            train(replace(config, train=replace(config.train, seed=seed), resume=config.out.exists()), base)
    demo.write(made / "pages.jsonl", ({"text": page} for page in world.pretraining_text(800, seed=7)))
    return made


def table(runs: list[dict], start: float) -> str:
    """Means over the seeds, with 95 % intervals of the gain in score for several seeds."""
    lines = [f"page loss of the SFT policy: {start:.3f}"]
    for name in dict.fromkeys(r["variant"] for r in runs):
        mine = [r for r in runs if r["variant"] == name]
        mean = lambda key: sum(r[key] for r in mine) / len(mine)  # noqa: B023, E731
        gain = [r["score"] - r["start_score"] for r in mine]
        centre = sum(gain) / len(gain)
        spread = math.sqrt(sum((g - centre) ** 2 for g in gain) / max(1, len(gain) - 1))
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(gain), math.nan)  # Student's t, 95 %
        lines.append(
            f"{name:11} seeds {len(mine)}  score {mean('start_score'):.3f} -> {mean('score'):.3f} "
            f"(gain {centre:.3f} ± {t * spread / math.sqrt(len(gain)):.3f})  wins {mean('wins'):.0%}  "
            f"KL {mean('final_kl'):.1f}  place {mean('place'):.0%}  page loss {mean('page_loss'):.3f}  ends "
            + ", ".join(f"{token} {sum(r['ends'].get(token, 0) for r in mine) / len(mine):.0%}" for token in ends(mine))
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and print the table of all runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--vary-runs", action="store_true", help="make the SFT and the reward run anew for each seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base.load(demo.BASE, **vars(demo.BASE_CONFIG))
    chat = Chat(base.tokenizer)
    prepared = prepare(options.out / "made", base, seed=0)
    file = options.out / "runs.json"
    runs = json.loads(file.read_text()) if file.exists() else []
    for seed in range(options.seeds):
        made = prepare(options.out / f"made-{seed}", base, seed) if options.vary_runs and seed else prepared
        for name in options.variants:
            if not any((r["variant"], r["seed"]) == (name, seed) for r in runs):
                runs.append(one(name, seed, base, chat, made, options.out))
                file.write_text(json.dumps(runs, indent=1) + "\n")
    if any(r["variant"] in COLOURS for r in runs):
        plot(runs, options.out / "ppo_world.svg")
    print(table(runs, page_loss(base, chat, prepared / "sft")))


if __name__ == "__main__":
    main()
