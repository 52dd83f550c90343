"""Fallback for models whose attention cannot be packed: one row per completion, without padding.

It uses the model's own attention and LM head: slower, with the same results.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowalign.config.sections import Sampling
from lowalign.data.pack import Example
from lowalign.model.attention.device import compute_device
from lowalign.model.attention.soft_prompt import KeysValues, SoftPrompt
from lowalign.model.forward.packed import TokenOutputs, TokenRequest, apply_scalar_head
from lowalign.model.sampling.batcher import Completion, PromptTask, SampledModel
from lowalign.model.sampling.draw import draw_tokens, uniforms
from lowalign.model.sampling.sample import prompt_tasks


def row_tokens(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, request: TokenRequest) -> TokenOutputs:
    """As `packed_tokens`, a row at a time."""
    outputs = [[_completion_tokens(model, e, i, soft, request) for i in range(len(e.completions))] for e in examples]
    requested = (request.logps, request.entropy, request.scalar_head is not None)
    return TokenOutputs(*([[c[k] for c in row] for row in outputs] if requested[k] else None for k in range(3)))


def _completion_tokens(
    model: nn.Module, example: Example, i: int, soft: SoftPrompt, request: TokenRequest
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(length of completion i,) log-probs, entropies and values; None for what is not requested."""
    completion = example.completions[i]
    n = len(completion)
    predicted = n if example.prompt else n - 1  # without a prompt there is nothing to predict the first token from
    inputs = example.prompt + completion[:-1]
    logps = entropies = values = None
    if request.logps:
        logits, _ = _logits(model, inputs, soft, keep=n)
        logits = logits[len(logits) - predicted :]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = (logits / request.temperature).log_softmax(-1)
        label = torch.tensor(completion, device=logp.device)
        logps = logp.gather(1, label[n - predicted :, None])[:, 0]
        entropies = -(logp.exp() * logp).sum(-1) if request.entropy else None
    if request.scalar_head is not None:
        values = apply_scalar_head(_hidden(model, inputs, soft, predicted), request.scalar_head)
    mask = torch.tensor(example.mask(i)) if request.supervised_only else torch.ones(n, dtype=torch.bool)
    return tuple(None if v is None else _padded(v, n, mask.to(v.device)) for v in (logps, entropies, values))


def _padded(values: Tensor, length: int, mask: Tensor) -> Tensor:
    """(length,): zeros before the first value, and where the mask is off."""
    values = torch.cat([values.new_zeros(length - len(values)), values])
    return torch.where(mask, values, 0.0)


def row_scores(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, scalar_head: Tensor) -> list[Tensor]:
    """As `packed_scores`, a row at a time."""
    return [
        torch.cat([apply_scalar_head(_hidden(model, e.prompt + c, soft, 1), scalar_head) for c in e.completions])
        for e in examples
    ]


def row_states(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt) -> list[Tensor]:
    """As `packed_states`, a row at a time."""
    results = []
    for e in examples:
        parts = []
        for i, completion in enumerate(e.completions):
            predicted = len(completion) if e.prompt else len(completion) - 1
            hidden = _hidden(model, e.prompt + completion[:-1], soft, predicted)
            mask = torch.tensor(e.mask(i)[len(completion) - predicted :], dtype=torch.bool)
            parts.append(hidden[mask.to(hidden.device)])
        results.append(torch.cat(parts))
    return results


@torch.no_grad()
def keys_values(model: nn.Module, ids: list[int]) -> list[KeysValues]:
    """For each layer the keys and values of a row of tokens, (1, kv_heads, len(ids), head_dim) each."""
    cache = DynamicCache()  # without the model's config it keeps keys outside a window too
    row = torch.tensor([ids], device=compute_device(model))
    model.base_model(input_ids=row, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _logits(
    model: nn.Module, ids: list[int], soft: SoftPrompt, keep: int, use_cache: bool = False
) -> tuple[Tensor, DynamicCache | None]:
    """Logits (at most keep, V) of the last positions of one row, and its cache."""
    inputs = _inputs(model, ids, soft, use_cache)
    words, cache = inputs["inputs_embeds"], inputs["past_key_values"]
    if not words.shape[1]:
        return words.new_zeros(0, model.get_input_embeddings().weight.shape[0]), cache
    options = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with _no_checkpointing(model, cache is not None):
        return model(**inputs, **options).logits[0, -keep:], cache


def _hidden(model: nn.Module, ids: list[int], soft: SoftPrompt, keep: int) -> Tensor:
    """(keep, hidden): the last hidden states of the last positions of one row."""
    inputs = _inputs(model, ids, soft, use_cache=False)
    with _no_checkpointing(model, inputs["past_key_values"] is not None):
        hidden = model.base_model(**inputs).last_hidden_state[0]
    return hidden[len(hidden) - keep :]


def _inputs(model: nn.Module, ids: list[int], soft: SoftPrompt, use_cache: bool) -> dict[str, Any]:
    """The arguments of a forward of one row behind a soft prompt."""
    embed = model.get_input_embeddings()
    device = compute_device(model)
    words = soft.prepend(embed(torch.tensor(ids, dtype=torch.long, device=device)))
    first, layers = soft.prefix_length, len(soft.keys_values or ())
    cache = DynamicCache(config=model.config) if layers or use_cache else None
    for layer in range(layers):
        cache.update(*soft.layer(layer, words.dtype), layer)
    total = first + len(words)
    return {
        "inputs_embeds": words[None],
        "attention_mask": torch.ones(1, total, dtype=torch.long, device=device),
        "position_ids": torch.arange(first, total, device=device)[None],
        "past_key_values": cache,
        "use_cache": cache is not None,
    }


@contextmanager
def _no_checkpointing(model: nn.Module, needed: bool) -> Iterator[None]:
    """Switch gradient checkpointing off for a forward with a cache: transformers does not allow both."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)] if needed else []
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


@torch.no_grad()
def row_sample(
    sampled: SampledModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """As `sample_batched`, one completion at a time through the model's own cache."""
    results = []
    for prompt in prompt_tasks(sampled, prompts, n, sampling, seeds):
        sampled.check()
        results.append([_sample_one(sampled, prompt, number, sampling) for number in range(n)])
    return results


def _sample_one(sampled: SampledModel, prompt: PromptTask, number: int, sampling: Sampling) -> Completion:
    """Completion `number` of a prompt."""
    model, random = sampled.model, uniforms(sampling.seed, prompt.seed, number, prompt.limit)
    logits, cache = _logits(model, prompt.ids, sampled.soft, keep=1, use_cache=True)
    device = logits.device
    eos = torch.zeros(1, logits.shape[1], dtype=torch.bool, device=device)
    eos[0, list(sampled.eos_ids)] = True
    ids: list[int] = []
    logps: list[Tensor] = []
    for t in range(prompt.limit):
        token, logp = draw_tokens(
            logits,
            torch.tensor(random[t : t + 1], device=device),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            eos if t < sampling.min_new_tokens else None,
        )
        ids.append(int(token))
        logps.append(logp)
        sampled.on_token(ids[-1])
        if sampled.ends(ids):
            break
        total = prompt.length + len(ids)
        output = model(
            input_ids=token[None],
            attention_mask=torch.ones(1, total, dtype=torch.long, device=device),
            position_ids=torch.tensor([[total - 1]], device=device),
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return Completion(ids, torch.cat(logps).cpu(), sampled.ends(ids))
