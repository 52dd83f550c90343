"""Token log-probabilities of Examples laid end to end in packs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowalign.data.pack import Example, Pack, pack
from lowalign.model import attention
from lowalign.model.logprob import Head, token_logprobs
from lowalign.model.rope import stretching

Prefix = list[tuple[Tensor, Tensor]]


def packed_logprobs(
    model: nn.Module,
    examples: Sequence[Example],
    virtual: Tensor | None,
    prefix: Prefix | None,
    supervised_only: bool,
    temperature: float,
) -> list[list[Tensor]]:
    """For each example, for each completion, (its length,) fp32 log-probs; 0.0 where there is nothing to predict from.

    virtual (v, hidden): embeddings before every prompt. prefix: for each layer keys and values before every prompt.
    """
    results: list[list[Tensor]] = [[] for _ in examples]
    for group in _groups(model.config.get_text_config(), examples, virtual, prefix):
        row = _laid_out([examples[i] for i in group], model, virtual, prefix)
        hidden = hidden_states(model, row, virtual, prefix)
        keep = row.supervised if supervised_only else slice(None)
        values, _ = token_logprobs(hidden[row.source[keep]], Head.of(model), row.labels[keep], temperature)
        tokens = sum(map(sum, row.lengths))
        flat = values.new_zeros(tokens).index_copy(0, row.place[keep], values)
        pieces = iter(flat.split([n for lengths in row.lengths for n in lengths]))
        for i, lengths in zip(group, row.lengths, strict=True):
            results[i] = [next(pieces) for _ in lengths]
    return results


def hidden_states(model: nn.Module, row: Pack, virtual: Tensor | None, prefix: Prefix | None) -> Tensor:
    """(T, hidden): the last hidden states of a Pack."""
    if virtual is None:
        inputs = {"input_ids": row.ids[None]}
    else:
        words = model.get_input_embeddings()(row.ids.clamp(min=0))
        learned = virtual.to(words.dtype)[row.virtual.clamp(min=0)]
        # Out of place: writing into the embeddings would lose the gradient of the virtual tokens.
        inputs = {"inputs_embeds": torch.where(row.virtual[:, None] >= 0, learned, words)[None]}
    layout = attention.Layout(row.segments, prefix)
    with attention.no_mask():
        output = model.base_model(**inputs, position_ids=row.positions[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0]


def _laid_out(examples: list[Example], model: nn.Module, virtual: Tensor | None, prefix: Prefix | None) -> Pack:
    tokens = 0 if virtual is None else len(virtual)
    first = 0 if prefix is None else prefix[0][0].shape[2]
    return pack(examples, tokens, first).to(model.get_input_embeddings().weight.device)


def _groups(
    config: PretrainedConfig, examples: Sequence[Example], virtual: Tensor | None, prefix: Prefix | None
) -> list[list[int]]:
    """Which Examples may share a row: all, unless the model's RoPE changes with the longest position in it.

    With longrope short and long Examples go apart, with dynamic RoPE each long Example goes alone.
    """
    kind, original = stretching(config)
    everything = list(range(len(examples)))
    if kind is None:
        return [everything]
    before = (0 if virtual is None else len(virtual)) + (0 if prefix is None else prefix[0][0].shape[2])
    ends = [before + len(e.prompt) + max(map(len, e.completions)) for e in examples]
    short, long = ([i for i in everything if (ends[i] > original) == above] for above in (False, True))
    apart = [[i] for i in long] if kind == "dynamic" else [long]
    return [group for group in [short, *apart] if group]
