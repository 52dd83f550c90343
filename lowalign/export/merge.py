"""Base + adapters → a model folder that plain transformers loads, compared with the trained model before it is kept.

onto "dequantized": the weights that the adapters were trained on, NF4 converted back to 16 bit. onto "original": the
base's own 16-bit weights, which the adapters never saw: the merged model is then about 20 times further from the trained
one (docs/export.md).

DIR/lowalign.json   {"merge": {"onto", "kl", "top1", "verified", "adapters", "base"}}
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from lowalign.config.export import MergeConfig
from lowalign.durable import check_disk, new_folder, write_json
from lowalign.errors import UserError
from lowalign.export.agreement import TrainedModel, check_predictions, check_prompts, check_scores, run_trained
from lowalign.export.bake import BakedPrompt, bake, baked_prompt, config_changes, write_tokenizer
from lowalign.export.merged_weights import Plan, plan_merge, quantize
from lowalign.export.model_folder import write_model_files
from lowalign.export.nf4 import quantization_config
from lowalign.export.ollama import modelfile
from lowalign.export.sources import Sources, heldout_files, read_sources
from lowalign.export.weight_files import write_shards
from lowalign.log import log, progress
from lowalign.model.base.base import Base, set_pad_token
from lowalign.model.base.hub import load_tokenizer


def merge(adapters: Sequence[str], out: str | Path, **options: Any) -> dict[str, Any]:
    """Write base + adapters as plain weights to a new folder. Returns what its lowalign.json holds under "merge".

    adapters: runs, adapter folders or Hub ids, in the order they stack; each brings the adapters it was trained on top of.
    options: those of `lowalign merge` (lowalign.config.export.MergeConfig), such as onto="original" or verify=False.
    Raises UserError when the merge is not possible or not the trained model; then nothing is left of it.
    """
    return write_merged(MergeConfig(tuple(map(str, adapters)), Path(out), **options))


def write_merged(config: MergeConfig, base: Base | None = None) -> dict[str, Any]:
    """As `merge`. base: one that is loaded already, for the comparison."""
    out = config.out.expanduser()
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; name another folder with --out")
    shard_bytes = _bytes(config.max_shard_size)
    sources = read_sources(config)
    prompts = check_prompts(sources.chat, heldout_files(config)) if config.verify else []
    job = _plan(config, sources)
    check_disk(out, job.plan.nbytes, "the merged model takes")
    if config.verify:
        _check_memory(job.plan)
    report = sources.report() | {"quantize": config.quantize, "kl": None, "top1": None, "verified": False}
    trained = (
        run_trained(sources, config.adapters, prompts, getattr(torch, config.dtype), base) if config.verify else None
    )
    try:
        with new_folder(out) as temp:
            write_model_files(sources.base, temp, job.changes, sources.chat.template, sources.eos_ids())
            if job.prompt:
                write_tokenizer(temp, job.prompt, sources.chat)
            if not job.plan.reward and not job.nf4:
                _write_modelfile(temp, sources)
            with progress(total=job.plan.nbytes, unit="B", unit_scale=True, desc="merge") as bar:
                write_shards(temp, job.plan.tensors, shard_bytes, bar.update)
            if trained is not None:
                report |= _compare(temp, sources, trained, job) | {"verified": True}
            write_json(temp / "lowalign.json", {"merge": report})
    except (OSError, SafetensorError) as error:
        raise UserError(f"the merged model could not be written to {out}: {error}; nothing of it is left") from error
    log(f"the merged model is in {out}")
    return report


@dataclass(frozen=True)
class _Job:
    """changes: keys of config.json."""

    plan: Plan
    changes: dict[str, Any]
    prompt: BakedPrompt | None
    nf4: bool


def _plan(config: MergeConfig, sources: Sources) -> _Job:
    """What is to be written; nothing is computed yet. Raises UserError for what plain weights cannot hold."""
    dequantized, dtype = sources.onto == "dequantized", getattr(torch, config.dtype)
    plan = plan_merge(
        sources.base,
        sources.config,
        sources.updates,
        dequantized,
        dtype,
        sources.scalar_head,
        sources.trained_dtype or torch.bfloat16,
    )
    changes: dict[str, Any] = {"dtype": config.dtype, "lowalign": {"merged_onto": sources.onto}}
    vectors, prompt = sources.soft_prompt, None
    if vectors is not None:
        on_text = sources.stack[-1].meta.get("prompt_format") == "text"
        prompt_in = config.prompt_in or ("tokenizer" if on_text else "template")
        log(
            f"the soft prompt's {len(vectors)} tokens are put first by the {prompt_in.replace('template', 'chat template')}"
        )
        prompt = baked_prompt(vectors, sources.chat, prompt_in == "template")
        changes |= config_changes(sources.config, prompt)
        plan = bake(plan, prompt)
    if plan.reward:
        changes |= _classifier_config(sources)
    if config.quantize:
        plan = quantize(plan)
        head = "score" if plan.reward else plan.skeleton.head.removesuffix(".weight")
        changes["quantization_config"] = quantization_config(config.dtype, head)
    return _Job(plan, changes | {"tie_word_embeddings": plan.tied}, prompt, bool(config.quantize))


def _compare(folder: Path, sources: Sources, trained: TrainedModel, job: _Job) -> dict[str, float]:
    """What the comparison of the merged and the trained model adds to the report. Raises UserError when they differ."""
    virtual = job.prompt.ids if job.prompt else []
    if trained.scores is not None:
        return vars(check_scores(folder, trained, virtual))
    result = check_predictions(folder, sources, trained, virtual, job.nf4)
    return {"kl": result.kl, "top1": result.top1}


def _write_modelfile(folder: Path, sources: Sources) -> None:
    """For Ollama, where its template language can say what the chat template does."""
    tokenizer = load_tokenizer(str(folder))
    text = modelfile(tokenizer, sources.eos_ids()) if tokenizer.chat_template else None
    if text is None:
        log("no Modelfile: the chat template does more than Ollama's can say; llama.cpp reads the template itself")
    else:
        (folder / "Modelfile").write_text(text, encoding="utf-8")


def _check_memory(plan: Plan) -> None:
    """Raises UserError when the check cannot load the merged model."""
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if plan.nbytes > room:
        raise UserError(
            f"the check loads the merged model, which takes {plan.nbytes / 1e9:.1f} GB of memory; {room / 1e9:.1f} GB are free. "
            "Free some memory, or skip the check with --no-verify (lowalign.json then says that it was skipped)"
        )


def _classifier_config(sources: Sources) -> dict[str, Any]:
    """What makes config.json that of a sequence classifier with one score, read at the last token that is no padding.

    A pad token that ends answers would hide their end from the score, so it is another one.
    """
    config, tokenizer = sources.config, sources.chat.tokenizer
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"transformers has no sequence classifier for {config.model_type}; ship the adapter folder itself"
        )
    name = AutoModelForSequenceClassification._model_mapping[type(config)].__name__
    set_pad_token(tokenizer, tuple(sources.eos_ids()))
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return {"architectures": [name], "pad_token_id": tokenizer.pad_token_id, **labels}


def _bytes(size: str) -> int:
    """ "5GB" → 5,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", size.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--max-shard-size {size}: write a size such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " "))
