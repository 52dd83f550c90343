"""`lowalign plan`: memory, time and traffic of a run, predicted by a dry run of its own steps on the meta device."""

import json
from dataclasses import replace
from typing import Any

from lowalign.config import cards
from lowalign.config.dump import dump
from lowalign.config.plan import PlanOptions, planned_verb, without_plan
from lowalign.durable import write_file
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.plan import several_cards
from lowalign.plan.figures import CONTEXT, GIB, Figures
from lowalign.plan.fit import search
from lowalign.plan.meta_base import load_config
from lowalign.plan.planner import Config, Planner, Setting

ROUNDS = ("ppo", "best-of-n")  # verbs whose time is that of a round


def plan(options: PlanOptions) -> int:
    """Run the command. Returns the exit code."""
    config, (name, card) = without_plan(options), cards.card(options.card)
    if options.write and options.write.exists():
        raise UserError(f"{options.write} exists and is not overwritten; name another file")
    if options.cards > 1 and planned_verb(options) == "best-of-n":
        raise UserError("--cards is for commands that train in several processes; best-of-n runs in one")
    own = several_cards.share(config, options.cards)
    planner = Planner(load_config(config.model, config.base.revision), own)
    setting = planner.setting(options.length)
    if setting.length > planner.positions:
        raise UserError(
            f"{setting.length:,} tokens: the model has positions for {planner.positions:,}; set --length lower"
        )
    vram = cards.memory(options.vram) if options.vram else card.memory * 10**9
    figures, found = planner.figures(setting), {}
    if options.vram:
        figures, found = _search(planner, setting, vram, options)
    report = {
        "verb": planned_verb(options),
        "model": config.model,
        "card": name,
        "vram_gib": round(vram / GIB, 3),
        "length": setting.length,
        "checkpointing": figures.checkpointing,
        **figures.report(card),
        **several_cards.timing(figures, card, config, options.cards, options.link_bandwidth),
        "fits": figures.needed <= vram,
        "max_length": None,
        "token_budget": setting.token_budget or None,
        **found,
        "predicted_by": "dry run",
    }
    print(json.dumps(report) if options.json else _text(report, figures))
    if options.write:
        _write(options, config, figures, report)
    return 0


def _search(planner: Planner, setting: Setting, vram: int, options: PlanOptions) -> tuple[Figures, dict[str, Any]]:
    """-> the figures of the setting (with checkpoint inputs in CPU memory where it does not fit otherwise), and the largest
    values that fit."""
    fit = search(planner, setting, vram)
    if isinstance(fit, Figures):
        offloads = fit.checkpointing != planner.figures(setting).checkpointing
        return fit, {"needs_offload": offloads, "max_length": None, "token_budget": None, "keep_layers": 0}
    found = {"needs_offload": bool(fit.changes), "max_length": fit.longest, "token_budget": fit.token_budget}
    found["keep_layers"] = fit.keep_layers
    if options.rank:
        found["max_rank"] = planner.rank(vram, setting, **fit.changes)
    return fit.figures, found


def _write(options: PlanOptions, config: Config, figures: Figures, report: dict[str, Any]) -> None:
    """Write the recipe with the values that fit. Raises UserError when none do."""
    longest = report["max_length"]
    if longest is None:
        raise UserError(
            f"no length fits in {report['vram_gib']} GiB, so there is no recipe to write to {options.write}"
        )
    train = replace(config.train, token_budget=report["token_budget"], checkpointing=figures.checkpointing)
    data = replace(config.data, max_length=min(report["length"], longest))
    write_file(options.write, dump(replace(config, train=train, data=data, out=None)))
    log(f"wrote {options.write}")


def _text(report: dict[str, Any], figures: Figures) -> str:
    """The report for people."""
    batch = f"token budget {figures.token_budget:,}" if figures.token_budget else "one a micro-batch"
    lines = [
        f"{report['verb']} on {report['model']}, predicted by a dry run: {report['length']:,} tokens an example, {batch}, "
        f"checkpointing {report['checkpointing']}",
        f"\npeak {report['peak_gib']:8.2f} GiB   {report['where']}",
    ]
    lines += [
        f"     {size:8.2f}       {name.replace('_', ' ')}"
        for name, size in report["components"].items()
        if size >= 0.005 or name == "base"
    ]
    verdict = "fits" if report["fits"] else "does not fit"
    lines += [
        f"with {CONTEXT / GIB:.1f} GiB of CUDA context and {figures.left_free / GIB:.1f} left free: {figures.needed / GIB:.2f} GiB; "
        f"it {verdict} in {report['vram_gib']:.2f}",
    ]
    others = {name: size for name, size in report["phases"].items() if name != figures.highest.name}
    lines += [f"     {size:8.2f}       peak of: {name}" for name, size in others.items()]
    lines += [
        f"\ntime on {_cards(report)}: {report['tokens_per_second']:,.0f} tokens a second at most ({report['step_seconds']:.1f} s a {'round' if report['verb'] in ROUNDS else 'step'}), by roofline",
        *_several(report),
        f"a micro-batch: {report['kernels']:,} kernels, {report['bytes_moved_gb']:,.0f} GB moved, {report['tflops']:,.0f} TFLOP",
        f"CPU memory for offload: {report['cpu_gib']:.1f} GiB; disk: {report['checkpoint_gb']:.2f} GB a checkpoint",
    ]
    if "needs_offload" in report:
        lines.append(_found(report))
    return "\n".join(lines)


def _cards(report: dict[str, Any]) -> str:
    return f"an {report['card']}" if report["cards"] == 1 else f"{report['cards']} × {report['card']}"


def _several(report: dict[str, Any]) -> list[str]:
    """What each of several cards does, as lines of text."""
    if report["cards"] == 1:
        return []
    examples = report["examples_per_card"]
    return [
        f"each card holds the base and all adapters, and computes at most {examples} of a step's examples; summing the gradients takes "
        f"{report['all_reduce_seconds']:.3f} s of it"
    ]


def _found(report: dict[str, Any]) -> str:
    if report["max_length"] is None:
        return f"\nno length fits in {report['vram_gib']:.2f} GiB with checkpointing {report['checkpointing']}"
    text = (
        f"\nlargest that fits: {report['max_length']:,} tokens in one example; token budget {report['token_budget']:,}"
    )
    if "max_rank" in report:
        text += f"; adapter.r {report['max_rank']}"
    if report["keep_layers"]:
        text += (
            f"; or {report['keep_layers']} layers that keep their activations (--train.keep-layers), which is faster"
        )
    return text + ("; it needs --train.checkpointing offload" if report["needs_offload"] else "")
