"""Baking: a trained soft prompt becomes rows of the embedding, and new tokens that stand before every text.

Prompt tuning (arXiv 2104.08691) feeds v trained vectors before the embedded text. A model whose embedding holds them as v
more rows computes the same from v more token ids. Rows that the base has to spare are filled first.

One place writes the virtual tokens, so that a text which is tokenized again does not get them twice: the chat template, or
the tokenizer of an adapter that is used without a template. The folder then has no chat template.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lowalign.data.chat import Chat
from lowalign.durable import write_json
from lowalign.errors import UserError
from lowalign.export.merged_weights import Plan
from lowalign.export.weight_files import PlannedTensor
from lowalign.model.base.hub import load_tokenizer

PROBE = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(frozen=True)
class BakedPrompt:
    """vectors: (v, hidden), fp32. ids: of the v virtual tokens, which follow the tokenizer's own. in_template: the chat
    template writes them; else the tokenizer does."""

    vectors: Tensor
    ids: list[int]
    in_template: bool

    @property
    def tokens(self) -> list[str]:
        """As the tokenizer spells them."""
        return [f"<|virtual_{i}|>" for i in range(len(self.ids))]


def baked_prompt(vectors: Tensor, chat: Chat, in_template: bool) -> BakedPrompt:
    """Raises UserError when the tokenizer has tokens of these names, from a prompt that was baked before."""
    vocabulary = chat.tokenizer.get_vocab()
    first = max(vocabulary.values()) + 1
    prompt = BakedPrompt(vectors.float(), list(range(first, first + len(vectors))), in_template)
    if prompt.tokens[0] in vocabulary:
        raise UserError(
            f"the base has a token {prompt.tokens[0]}: a soft prompt was baked into it before. Two prompts cannot stand "
            "first; merge into the base without the first one"
        )
    return prompt


def bake(plan: Plan, prompt: BakedPrompt) -> Plan:
    """The plan with the prompt's vectors in the embedding. The LM head is untied and gives the virtual tokens logit 0."""
    rows = prompt.ids[-1] + 1
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    embedding = tensors[plan.skeleton.embedding]
    tensors[embedding.name] = _with_rows(embedding, rows, prompt.ids, prompt.vectors / plan.skeleton.embedding_scale)
    if not plan.reward:
        head = tensors.get(plan.skeleton.head) or replace(embedding, name=plan.skeleton.head)
        tensors[head.name] = _with_rows(head, rows, prompt.ids, torch.zeros(()))
        bias = tensors.get(head.name.removesuffix("weight") + "bias")
        if bias:
            tensors[bias.name] = _with_rows(bias, rows, prompt.ids, torch.zeros(()))
    return replace(plan, tensors=list(tensors.values()), tied=False)


def _with_rows(tensor: PlannedTensor, rows: int, ids: Sequence[int], values: Tensor) -> PlannedTensor:
    """The tensor with at least `rows` rows, and `values` in those of `ids`."""
    shape = (max(tensor.shape[0], rows), *tensor.shape[1:])

    def make() -> Tensor:
        weight = torch.zeros(shape, dtype=tensor.dtype)
        weight[: tensor.shape[0]] = tensor.make()
        weight[ids] = values.to(tensor.dtype)
        return weight

    return replace(tensor, shape=shape, make=make)


def config_changes(config: PretrainedConfig, prompt: BakedPrompt) -> dict[str, Any]:
    """What config.json says of it. Raises UserError for a base whose text model is one of several."""
    if config.get_text_config() is not config:
        raise UserError(f"a soft prompt cannot be baked into {config.model_type}, which has more than a text model")
    return {"vocab_size": max(config.vocab_size, prompt.ids[-1] + 1)}


def write_tokenizer(folder: Path, prompt: BakedPrompt, chat: Chat) -> None:
    """Add the virtual tokens to a model folder's tokenizer, suppress them in generation, and check the ids of a text.

    Raises UserError when the tokenizer does not put them first exactly once.
    """
    options = json.loads((folder / "tokenizer_config.json").read_text())
    file = folder / "tokenizer.json"
    if not file.exists():  # a tokenizer of sentencepiece, which transformers converts
        chat.tokenizer.backend_tokenizer.save(str(file))
    backend = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": i, "content": token, **flags} for i, token in zip(prompt.ids, prompt.tokens, strict=True)]
    backend["added_tokens"] += added
    if "added_tokens_decoder" in options or (folder / "tokenizer.model").exists():  # llama.cpp's converter reads it
        known = options.get("added_tokens_decoder", {})
        entries = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in added}
        options["added_tokens_decoder"] = known | entries
    template, text = folder / "chat_template.jinja", "".join(prompt.tokens)
    options.pop("chat_template", None)
    for key in ("add_bos_token", "add_eos_token"):  # transformers would make the post-processor anew
        options.pop(key, None)
    if prompt.in_template:
        backend["post_processor"] = _without_special_tokens(backend["post_processor"])
        template.write_text(text + _bos(chat) + chat.template, encoding="utf-8")
        options["chat_template"] = template.read_text(encoding="utf-8")
        if chat.bos_ids:  # llama.cpp adds bos unless this is false
            options["add_bos_token"] = False
    else:
        backend["post_processor"] = _with_first(backend["post_processor"], prompt)
        template.unlink(missing_ok=True)
    file.write_text(json.dumps(backend, ensure_ascii=False, indent=2), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", options)
    generation = folder / "generation_config.json"
    write_json(generation, json.loads(generation.read_text()) | {"suppress_tokens": prompt.ids})
    _check(folder, prompt, chat)


def _bos(chat: Chat) -> str:
    """The bos that the training put before a conversation and the template does not write."""
    rendered = chat.tokenizer.apply_chat_template(PROBE, chat_template=chat.template, tokenize=False)
    bos = chat.tokenizer.bos_token
    written = bos is None or rendered.startswith(bos)
    return "" if written or chat.prompt_ids(PROBE)[0] != chat.tokenizer.bos_token_id else bos


def _without_special_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The tokenizer's last step without the tokens it adds: the chat template writes bos."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return processor | {"processors": [_without_special_tokens(p) for p in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        return processor
    kept = {key: [piece for piece in processor[key] if "Sequence" in piece] for key in ("single", "pair")}
    return processor | kept


def _with_first(processor: dict[str, Any] | None, prompt: BakedPrompt) -> dict[str, Any]:
    """The tokenizer's last step with the virtual tokens before what it adds."""
    sequence = lambda name, i: {"Sequence": {"id": name, "type_id": i}}  # noqa: E731
    if processor is not None and processor["type"] == "Sequence":
        *before, last = processor["processors"]
        if last["type"] == "TemplateProcessing":
            return processor | {"processors": [*before, _with_first(last, prompt)]}
    if processor is None or processor["type"] != "TemplateProcessing":
        template = {"type": "TemplateProcessing", "special_tokens": {}, "single": [sequence("A", 0)]}
        template["pair"] = [sequence("A", 0), sequence("B", 1)]
        last = _with_first(template, prompt)
        return last if processor is None else {"type": "Sequence", "processors": [processor, last]}
    special = {"id": prompt.tokens[0], "ids": prompt.ids, "tokens": prompt.tokens}
    first = {"SpecialToken": {"id": special["id"], "type_id": 0}}
    return processor | {
        "single": [first, *processor["single"]],
        "pair": [first, *processor["pair"]],
        "special_tokens": processor["special_tokens"] | {special["id"]: special},
    }


def _check(folder: Path, prompt: BakedPrompt, chat: Chat) -> None:
    """Raises UserError when plain transformers would not give the ids of the training after the virtual ones."""
    tokenizer = load_tokenizer(str(folder))
    if prompt.in_template:
        expected = prompt.ids + chat.prompt_ids(PROBE)
        text = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, tokenize=False)
        results = [tokenizer(text, add_special_tokens=special).input_ids for special in (False, True)]
    else:
        expected = prompt.ids + chat.text_ids(PROBE[0]["content"])
        results = [tokenizer(PROBE[0]["content"]).input_ids]
    for ids in results:
        if ids != expected:
            raise UserError(
                f"a soft prompt cannot be baked into this tokenizer ({type(tokenizer).__name__}): a probe becomes {ids[:12]} …, "
                f"and was {expected[:12]} … in training. Ship the adapter folder itself (peft and lowalign load it)"
            )
