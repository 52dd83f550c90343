"""The fall-back for models whose attention the packed kernel cannot stand in for: one row per completion, no padding.

Slower, through the model's own attention and head; the same results.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowalign.config.sections import Sampling
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.attention.soft_prompt import KeysValues, SoftPrompt
from lowalign.model.forward.packed import TokenOutputs, TokenRequest, score
from lowalign.model.sampling.batcher import Completion
from lowalign.model.sampling.draw import pick, uniforms


def row_tokens(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, wanted: TokenRequest) -> TokenOutputs:
    """As `packed_tokens`, a row at a time."""
    found = [[_one(model, e, i, soft, wanted) for i in range(len(e.completions))] for e in examples]
    asked = (wanted.logps, wanted.entropy, wanted.head is not None)
    return TokenOutputs(*([[c[k] for c in row] for row in found] if asked[k] else None for k in range(3)))


def _one(
    model: nn.Module, example: Example, i: int, soft: SoftPrompt, wanted: TokenRequest
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(length of completion i,) log-probs, entropies and values, as far as they are wanted."""
    completion = example.completions[i]
    n = len(completion)
    known = n if example.prompt else n - 1  # without a prompt the first token has nothing to be predicted from
    before = example.prompt + completion[:-1]
    logps = entropies = values = None
    if wanted.logps:
        logits, _ = _logits(model, before, soft, keep=n)
        logits = logits[len(logits) - known :]
        exact = torch.promote_types(logits.dtype, torch.float32)
        logp = (logits.to(exact) / wanted.temperature).log_softmax(-1)
        label = torch.tensor(completion, device=logp.device)
        logps = logp.gather(1, label[n - known :, None])[:, 0]
        entropies = -(logp.exp() * logp).sum(-1) if wanted.entropy else None
    if wanted.head is not None:
        values = score(_hidden(model, before, soft, known), wanted.head)
    mask = torch.tensor(example.mask(i)) if wanted.supervised_only else torch.ones(n, dtype=torch.bool)
    return tuple(None if v is None else _filled(v, n, mask.to(v.device)) for v in (logps, entropies, values))


def _filled(values: Tensor, length: int, mask: Tensor) -> Tensor:
    """(length,): zeros in front where the first has nothing to be predicted from, and where the mask is off."""
    values = torch.cat([values.new_zeros(length - len(values)), values])
    return torch.where(mask, values, 0.0)


def row_scores(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, head: Tensor) -> list[Tensor]:
    """As `packed_scores`, a row at a time."""
    return [torch.cat([score(_hidden(model, e.prompt + c, soft, 1), head) for c in e.completions]) for e in examples]


@torch.no_grad()
def keys_values(model: nn.Module, ids: list[int]) -> list[KeysValues]:
    """For each layer the keys and values of a row of tokens, (1, kv_heads, len(ids), head_dim) each."""
    cache = DynamicCache()  # not told of the model's config, it keeps what lies before a window too
    row = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
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
    with _Uncheckpointed(model, cache is not None):
        return model(**inputs, **options).logits[0, -keep:], cache


def _hidden(model: nn.Module, ids: list[int], soft: SoftPrompt, keep: int) -> Tensor:
    """(keep, hidden): the last hidden states of the last positions of one row."""
    inputs = _inputs(model, ids, soft, use_cache=False)
    with _Uncheckpointed(model, inputs["past_key_values"] is not None):
        hidden = model.base_model(**inputs).last_hidden_state[0]
    return hidden[len(hidden) - keep :]


def _inputs(model: nn.Module, ids: list[int], soft: SoftPrompt, use_cache: bool) -> dict[str, Any]:
    """A forward's arguments for one row behind a soft prompt."""
    embed = model.get_input_embeddings()
    device = embed.weight.device
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


class _Uncheckpointed:
    """A cache and gradient checkpointing exclude each other in transformers: keep the activations of such a forward."""

    def __init__(self, model: nn.Module, needed: bool) -> None:
        self.layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)] if needed else []

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.gradient_checkpointing = False

    def __exit__(self, *error) -> None:
        for layer in self.layers:
            layer.gradient_checkpointing = True


@torch.no_grad()
def row_sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int,
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    soft: SoftPrompt,
    seeds: Sequence[int] | None,
    check: Callable[[], None] = lambda: None,
) -> list[list[Completion]]:
    """As `sample`, one completion at a time through the model's own cache."""
    results = []
    for i, prompt in enumerate(prompts):
        if not prompt and not soft.virtual_tokens:
            raise UserError(f"prompt {i} is empty; give it at least one token (the bos token, say)")
        check()
        seed = i if seeds is None else seeds[i]
        luck = [uniforms(sampling.seed, seed, j, sampling.max_new_tokens) for j in range(n)]
        results.append([_draw(model, list(prompt), sampling, eos_ids, soft, u) for u in luck])
    return results


def _draw(
    model: nn.Module,
    prompt: list[int],
    sampling: Sampling,
    eos_ids: Sequence[int],
    soft: SoftPrompt,
    luck: list[float],
) -> Completion:
    """One completion; luck: a uniform number for each token it may have."""
    logits, cache = _logits(model, prompt, soft, keep=1, use_cache=True)
    device, at = logits.device, cache.get_seq_length()
    eos = torch.zeros(1, logits.shape[1], dtype=torch.bool, device=device)
    eos[0, list(eos_ids)] = True
    ids: list[int] = []
    logps: list[Tensor] = []
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
    if at >= positions:
        raise UserError(f"a prompt takes {at} positions and the model has {positions}; shorten it")
    for t in range(int(min(sampling.max_new_tokens, positions - at))):
        token, logp = pick(
            logits,
            torch.tensor(luck[t : t + 1], device=device),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            eos if t < sampling.min_new_tokens else None,
        )
        ids.append(int(token))
        logps.append(logp)
        if ids[-1] in eos_ids:
            break
        total = at + len(ids)
        output = model(
            input_ids=token[None],
            attention_mask=torch.ones(1, total, dtype=torch.long, device=device),
            position_ids=torch.tensor([[total - 1]], device=device),
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return Completion(ids, torch.cat(logps).cpu(), ids[-1] in eos_ids)
