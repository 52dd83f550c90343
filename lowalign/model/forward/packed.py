"""Log-probabilities, entropies, values and scores of Examples laid end to end in packs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lowalign.data.pack import Example, Pack, pack
from lowalign.model.attention.device import compute_device
from lowalign.model.attention.interface import no_mask
from lowalign.model.attention.packed import Layout
from lowalign.model.attention.rope import rope_scaling
from lowalign.model.attention.soft_prompt import SoftPrompt
from lowalign.model.forward.logprob import LMHead, token_logprobs
from lowalign.model.forward.noise import noise_wanted, with_noise


@dataclass(frozen=True)
class TokenRequest:
    """What to compute for the completion tokens of Examples.

    logps: the log-probability of each token at this temperature. entropy: also the entropy of the distribution it comes
    from. scalar_head (1, hidden): the value of the hidden state that predicts each token. supervised_only: 0.0 for
    unsupervised tokens, whose logits are then not computed.
    """

    logps: bool = True
    entropy: bool = False
    scalar_head: Tensor | None = None
    supervised_only: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class TokenOutputs:
    """For each example, for each completion, (its length,) in fp32; None for what was not requested.

    0.0 for a first token without a prompt: there is nothing to predict it from.
    """

    logps: list[list[Tensor]] | None
    entropies: list[list[Tensor]] | None
    values: list[list[Tensor]] | None


def packed_tokens(
    model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, request: TokenRequest
) -> TokenOutputs:
    """The requested numbers for the completion tokens of the Examples, behind a soft prompt."""
    requested = (request.logps, request.entropy, request.scalar_head is not None)
    outputs: list[list[list[Tensor]] | None] = [[[] for _ in examples] if needed else None for needed in requested]
    for group in _groups(model.config.get_text_config(), examples, soft):
        row = pack_behind(soft, [examples[i] for i in group], model)
        keep = row.supervised if request.supervised_only else slice(None)
        hidden = hidden_states(model, row, soft)[row.predictors[keep]]
        logps = entropies = None
        if request.logps:
            labels = row.labels[keep]
            logps, entropies = token_logprobs(hidden, LMHead.of(model), labels, request.temperature, request.entropy)
        values = None if request.scalar_head is None else apply_scalar_head(hidden, request.scalar_head)
        for output, flat in zip(outputs, (logps, entropies, values), strict=True):
            if output is not None:
                for i, by_completion in zip(group, _by_completion(flat, row, keep), strict=True):
                    output[i] = by_completion
    return TokenOutputs(*outputs)


def _by_completion(flat: Tensor, row: Pack, keep: Tensor | slice) -> list[list[Tensor]]:
    """One number for each kept token -> for each example, for each completion, (its length,); 0.0 for other tokens."""
    whole = flat.new_zeros(sum(map(sum, row.lengths))).index_copy(0, row.flat_index[keep], flat)
    pieces = iter(whole.split([n for lengths in row.lengths for n in lengths]))
    return [[next(pieces) for _ in lengths] for lengths in row.lengths]


def packed_scores(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt, scalar_head: Tensor) -> list[Tensor]:
    """For each example (its completions,): the scalar head (1, hidden) on the hidden state of each one's last token."""
    results: list[Tensor] = [scalar_head] * len(examples)
    for group in _groups(model.config.get_text_config(), examples, soft):
        row = pack_behind(soft, [examples[i] for i in group], model)
        scores = apply_scalar_head(hidden_states(model, row, soft)[row.ends], scalar_head)
        by_example = scores.split([len(lengths) for lengths in row.lengths])
        for i, example_scores in zip(group, by_example, strict=True):
            results[i] = example_scores
    return results


def packed_states(model: nn.Module, examples: Sequence[Example], soft: SoftPrompt) -> list[Tensor]:
    """For each example (its supervised tokens, hidden): the last hidden states that predict them."""
    results: list[Tensor] = [torch.empty(0)] * len(examples)
    for group in _groups(model.config.get_text_config(), examples, soft):
        row = pack_behind(soft, [examples[i] for i in group], model)
        states = hidden_states(model, row, soft)[row.predictors[row.supervised]]
        for i, own in zip(group, states.split([examples[i].supervised for i in group]), strict=True):
            results[i] = own
    return results


def apply_scalar_head(hidden: Tensor, scalar_head: Tensor) -> Tensor:
    """hidden (N, H), scalar_head (1, H) -> (N,), in fp32 at least."""
    return (hidden.to(torch.promote_types(hidden.dtype, scalar_head.dtype)) @ scalar_head.T)[:, 0]


def hidden_states(model: nn.Module, row: Pack, soft: SoftPrompt) -> Tensor:
    """(T, hidden): the last hidden states of a Pack."""
    if soft.embeddings is None and not noise_wanted():
        inputs = {"input_ids": row.ids[None]}
    else:
        words = model.get_input_embeddings()(row.ids.clamp(min=0))
        words = with_noise(words, row.positions) if noise_wanted() else words
        inputs = {"inputs_embeds": words[None]}
    if soft.embeddings is not None:
        virtual = soft.embeddings.to(words.dtype)[row.virtual.clamp(min=0)]
        # Not in place: writing into the embeddings would lose the gradient of the virtual tokens.
        inputs = {"inputs_embeds": torch.where(row.virtual[:, None] >= 0, virtual, words)[None]}
    layout = Layout(row.segments, soft)
    with no_mask():
        output = model.base_model(**inputs, position_ids=row.positions[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0]


def pack_behind(soft: SoftPrompt, examples: Sequence[Example], model: nn.Module) -> Pack:
    """A Pack of the Examples, each behind the soft prompt, on the model's device."""
    return pack(examples, soft.virtual_tokens, soft.prefix_length).to(compute_device(model))


def _groups(config: PretrainedConfig, examples: Sequence[Example], soft: SoftPrompt) -> list[list[int]]:
    """Which Examples may share a row: all, unless the model's RoPE changes with the longest position in it.

    longrope: short and long Examples in separate rows. dynamic: each long Example in a row of its own.
    """
    kind, original = rope_scaling(config)
    indices = list(range(len(examples)))
    if kind is None:
        return [indices]
    ends = [soft.length + len(e.prompt) + max(map(len, e.completions)) for e in examples]
    short, long = ([i for i in indices if (ends[i] > original) == above] for above in (False, True))
    long_groups = [[i] for i in long] if kind == "dynamic" else [long]
    return [group for group in [short, *long_groups] if group]
