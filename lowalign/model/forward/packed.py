"""Log-probabilities, values and scores of Examples laid end to end in packs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowalign.data.pack import Example, Pack, pack
from lowalign.model.attention import packed as attention
from lowalign.model.attention.rope import rope_scaling
from lowalign.model.attention.soft_prompt import SoftPrompt
from lowalign.model.forward.logprob import Head, token_logprobs


@dataclass(frozen=True)
class TokenRequest:
    """What is to be computed for the completion tokens of Examples.

    logps: each token's log-probability at this temperature, and with `entropy` that of the distribution it comes from.
    head: a scalar head (1, hidden); the value of the state before each token. supervised_only: 0.0 for all other tokens,
    whose logits are then never computed.
    """

    logps: bool = True
    entropy: bool = False
    head: Tensor | None = None
    supervised_only: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenOutputs:
    """For each example, for each completion, (its length,) in fp32; 0.0 where there is nothing to predict from. None for
    what was not wanted."""

    logps: list[list[Tensor]] | None
    entropies: list[list[Tensor]] | None
    values: list[list[Tensor]] | None


def packed_tokens(
    model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, wanted: TokenRequest
) -> TokenOutputs:
    """What is wanted of the Examples' completion tokens, behind a soft prompt."""
    found: list[list[list[Tensor]] | None] = [
        [[] for _ in examples] if asked else None for asked in (wanted.logps, wanted.entropy, wanted.head is not None)
    ]
    for group in _groups(model.config.get_text_config(), examples, soft):
        row = pack_behind(soft, [examples[i] for i in group], model)
        keep = row.supervised if wanted.supervised_only else slice(None)
        hidden = hidden_states(model, row, soft)[row.predictors[keep]]
        logps = entropies = None
        if wanted.logps:
            labels = row.labels[keep]
            logps, entropies = token_logprobs(hidden, Head.of(model), labels, wanted.temperature, wanted.entropy)
        values = None if wanted.head is None else score(hidden, wanted.head)
        for into, flat in zip(found, (logps, entropies, values), strict=True):
            if into is not None:
                for i, pieces in zip(group, _by_completion(flat, row, keep), strict=True):
                    into[i] = pieces
    return TokenOutputs(*found)


def _by_completion(flat: Tensor, row: Pack, keep: Tensor | slice) -> list[list[Tensor]]:
    """One number for each token kept -> for each example, for each completion, (its length,)."""
    whole = flat.new_zeros(sum(map(sum, row.lengths))).index_copy(0, row.flat_index[keep], flat)
    pieces = iter(whole.split([n for lengths in row.lengths for n in lengths]))
    return [[next(pieces) for _ in lengths] for lengths in row.lengths]


def packed_scores(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, head: Tensor) -> list[Tensor]:
    """For each example (its completions,): a scalar head (1, hidden) on the hidden state of each completion's last token."""
    results: list[Tensor] = [head] * len(examples)
    for group in _groups(model.config.get_text_config(), examples, soft):
        row = pack_behind(soft, [examples[i] for i in group], model)
        scores = score(hidden_states(model, row, soft)[row.ends], head)
        parts = scores.split([len(lengths) for lengths in row.lengths])
        for i, part in zip(group, parts, strict=True):
            results[i] = part
    return results


def score(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (N, H), head (1, H) -> (N,), in fp32 at least."""
    return (hidden.to(torch.promote_types(hidden.dtype, head.dtype)) @ head.T)[:, 0]


def hidden_states(model: nn.Module, row: Pack, soft: SoftPrompt) -> Tensor:
    """(T, hidden): the last hidden states of a Pack."""
    if soft.embeddings is None:
        inputs = {"input_ids": row.ids[None]}
    else:
        words = model.get_input_embeddings()(row.ids.clamp(min=0))
        learned = soft.embeddings.to(words.dtype)[row.virtual.clamp(min=0)]
        # Out of place: writing into the embeddings would lose the gradient of the virtual tokens.
        inputs = {"inputs_embeds": torch.where(row.virtual[:, None] >= 0, learned, words)[None]}
    layout = attention.Layout(row.segments, soft)
    with attention.no_mask():
        output = model.base_model(**inputs, position_ids=row.positions[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0]


def pack_behind(soft: SoftPrompt, examples: Sequence[Example], model: nn.Module) -> Pack:
    """The Pack of some Examples with room for the soft prompt, on the model's device."""
    return pack(examples, soft.virtual_tokens, soft.prefix_length).to(model.get_input_embeddings().weight.device)


def _groups(config: PretrainedConfig, examples: Sequence[Example], soft: SoftPrompt) -> list[list[int]]:
    """Which Examples may share a row: all, unless the model's RoPE changes with the longest position in it.

    With longrope short and long Examples go apart, with dynamic RoPE each long Example goes alone.
    """
    kind, original = rope_scaling(config)
    everything = list(range(len(examples)))
    if kind is None:
        return [everything]
    ends = [soft.length + len(e.prompt) + max(map(len, e.completions)) for e in examples]
    short, long = ([i for i in everything if (ends[i] > original) == above] for above in (False, True))
    apart = [[i] for i in long] if kind == "dynamic" else [long]
    return [group for group in [short, *apart] if group]
