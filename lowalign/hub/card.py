"""The model card, README.md: metadata that the Hub understands, and what a user of the model must know.

Metadata: https://huggingface.co/docs/hub/model-cards. Everything in it comes from the artefact's own files; nothing in it
names a place on this machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lowalign.errors import UserError
from lowalign.hub.artefact import CARD, Artefact
from lowalign.hub.loading import loading
from lowalign.hub.publishable import is_hub_id, published_base
from lowalign.report.local_paths import is_local_path, without_paths
from lowalign.report.recipe_summary import changed_options

PLOT = "metrics.svg"
GENERATED = (
    "<!-- Written by `lowalign push`, and written again by the next push. Delete this line to keep your own text. -->"
)
METHODS = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling on preferences",
    "dpo": "direct preference optimization (DPO)",
    "ppo": "proximal policy optimization (PPO)",
    "bitdelta": "BitDelta (arXiv 2402.10193), at one bit a weight",
}
KINDS = {
    "LORA": "LoRA",
    "PROMPT_TUNING": "soft prompt (prompt tuning)",
    "PREFIX_TUNING": "prefix (prefix tuning)",
    "BITDELTA": "BitDelta",
}
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".txt")


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the folder. repo: NAMESPACE/NAME. license: the base's license, license_name and
    license_link, those that are known. plot: whether PLOT is beside the card."""

    repo: str
    license: Mapping[str, str]
    plot: bool


def make_card(artefact: Artefact, facts: CardFacts, own: str | None) -> str:
    """The card of an artefact. own: a card that the user wrote; it is kept, and gets the metadata that it lacks.

    Raises UserError when the metadata of that card cannot be read.
    """
    artefact = replace(artefact, meta=without_paths(artefact.meta))
    metadata, text = _metadata(artefact, facts), "\n\n".join([*_sections(artefact, facts), GENERATED]) + "\n"
    if own is not None:
        return _completed(own, metadata, text)
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}"


def method_of(artefact: Artefact) -> str | None:
    """sft, dpo, … of the last training that the artefact had."""
    merged = artefact.meta.get("merge", {}).get("adapters") or [{}]
    return artefact.meta.get("method") or merged[-1].get("method")


def _metadata(artefact: Artefact, facts: CardFacts) -> dict[str, Any]:
    base, commit = published_base(artefact)
    kind = str(artefact.config.get("peft_type", "")).lower().replace("_", "-") if artefact.is_adapter else None
    tags = ["lowalign", method_of(artefact), kind, "reward-model" if artefact.reward else None]
    library = ("peft" if artefact.loads_in_peft else "lowalign") if artefact.is_adapter else "transformers"
    on_hub = commit or is_hub_id(base)
    metadata = {
        "base_model": base if on_hub else None,
        "base_model_relation": ("adapter" if artefact.is_adapter else "finetune") if on_hub else None,
        "library_name": library,
        "pipeline_tag": "text-classification" if artefact.reward else "text-generation",
        "datasets": _datasets(changed_options(artefact.meta.get("recipe"))),
        "tags": [tag for tag in tags if tag],
        **facts.license,
    }
    return {key: value for key, value in metadata.items() if value}


def _datasets(options: dict[str, Any]) -> list[str]:
    """Of the data files those that are datasets of the Hub, without the split."""
    data = options.get("data")
    files = data.get("files") if isinstance(data, dict) else None
    names = [str(name).partition(":")[0] for name in files or ()]
    return list(dict.fromkeys(name for name in names if is_hub_id(name) and not name.endswith(DATA_SUFFIXES)))


def _completed(own: str, metadata: dict[str, Any], text: str) -> str:
    """The user's card with the metadata that it lacks. Its text is not touched; `text` takes the place of an empty one."""
    try:
        card = ModelCard(own, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the metadata of {CARD} cannot be read: {str(error).splitlines()[0]}; correct it") from error
    before = card.data.to_dict()
    after = without_paths(before)
    if is_local_path(str(before.get("base_model", ""))):  # peft writes the folder of the base
        after.pop("base_model")
    after = metadata | {key: value for key, value in after.items() if value is not None}
    tags = [tag for tag in before.get("tags") or () if not is_local_path(tag.rpartition(":")[2])]
    after["tags"] = list(dict.fromkeys([*tags, *metadata["tags"]]))
    if after == before and card.text.strip():
        return own
    options = {"sort_keys": False, "allow_unicode": True, "width": float("inf")}
    return f"---\n{yaml.safe_dump(after, **options)}---\n{card.text if card.text.strip() else text}"


def _sections(artefact: Artefact, facts: CardFacts) -> Iterator[str]:
    yield f"# {facts.repo.rpartition('/')[2]}"
    yield _summary(artefact)
    yield _table(artefact)
    yield "## How to load it"
    yield from loading(artefact, facts.repo)
    if options := changed_options(artefact.meta.get("recipe")):
        yield "## Training"
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        yield f"The options that differ from lowalign's defaults:\n\n```yaml\n{text}```"
    metrics = [(name, value) for name, value in _metrics(artefact) if isinstance(value, int | float)]
    if metrics or facts.plot:
        yield "## Metrics"
    if metrics:
        yield "\n".join(["| metric | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in metrics)])
    if facts.plot:
        yield f"![Metrics by training step]({PLOT})"
    yield "## Limits"
    yield "\n".join(f"- {limit}" for limit in _limits(artefact))


def _summary(artefact: Artefact) -> str:
    base, commit = published_base(artefact)
    link = f"[{base}](https://huggingface.co/{base})" if commit or is_hub_id(base) else base or "its base"
    what = KINDS.get(artefact.config.get("peft_type", ""), "adapter") if artefact.is_adapter else "model"
    method = METHODS.get(method_of(artefact) or "", method_of(artefact) or "")
    made = f", made with lowalign by {method}" if method else ", made with lowalign" if artefact.meta else ""
    relation = "for" if artefact.is_adapter else "from"
    reward = " It is a reward model: it gives a score to an answer." if artefact.reward else ""
    return f"A {what} {relation} {link}{made}.{reward}"


def _table(artefact: Artefact) -> str:
    base, commit = published_base(artefact)
    meta, merged = artefact.meta, artefact.meta.get("merge", {})
    identity = meta.get("base") or merged.get("base") or {}
    rows = {
        "base": base,
        "base revision": commit,
        "base weights": identity.get("weights") and f"{identity['weights']} (hash)",
        "trained against": {"nf4": "the base in 4 bit (NF4)", "none": "the base in 16 or 32 bit"}.get(
            identity.get("quantization")
        ),
        "training steps": meta.get("step") or (merged.get("adapters") or [{}])[-1].get("step"),
        "frozen adapters that it was trained on top of, in parents/": meta.get("parents"),
        "LoRA rank": artefact.config.get("r"),
        "merged onto": merged.get("onto") and f"the {merged['onto']} weights of the base",
        "weights": "4 bit (NF4), quantized after the merge" if merged.get("quantize") == "nf4" else None,
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _metrics(artefact: Artefact) -> list[tuple[str, Any]]:
    merged = artefact.meta.get("merge", {})
    names = {
        "kl": "KL(trained ‖ merged), nats a token",
        "top1": "same top token, merged and trained",
        "error": "error of the scores, merged against trained",
        "spread": "spread of the trained scores",
    }
    own = [(label, merged[key]) for key, label in names.items() if key in merged]
    return [*sorted((artefact.meta.get("metrics") or {}).items()), *own]


def _limits(artefact: Artefact) -> Iterator[str]:
    merged = artefact.meta.get("merge")
    if artefact.is_adapter:
        yield "It fits only the base named above; on any other its results mean nothing."
    if (artefact.meta.get("base") or {}).get("quantization") == "nf4":
        yield "It was trained against the 4-bit base. On the 16-bit base its answers differ slightly."
    if merged and not merged.get("verified"):
        yield "The merged weights were not compared with the trained model."
    if artefact.reward:
        yield "A score ranks answers to the same prompt. Scores of different prompts, or far from the training data, do not compare."
    yield "It has the limits of its base. Beyond the metrics on this page nothing was evaluated, safety included."
