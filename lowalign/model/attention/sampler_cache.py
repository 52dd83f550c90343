"""Attention of the sampler: n samples of a prompt share its keys and values, which are computed and kept once.

A forward is either a row of whole prompts, or one token of each live sample. A sample's token attends to the keys of its
prompt and to its own as two separate blocks: all samples of a prompt are queries of one block, and the two results are
joined by their log-sum-exps, which is exact.
"""

import torch
from torch import Tensor

from lowalign.model.attention import blockwise
from lowalign.model.attention.blockwise import LayerAttention, block_attention, varlen_attention, visible
from lowalign.model.attention.sampler_layout import PromptBatch, TokenBatch
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, KeysValues, SoftPrompt

QUERY_ROWS = 512  # queries of a prompt computed at a time where their scores are held in memory
ROOM = 64  # tokens in a sample's key buffer at first; the buffer doubles when it is full
UNBOUNDED = (-1, -1)  # flash kernel: every query sees every key of its sequence


class SamplerCache:
    """Keys and values of live samples (rows 0..R-1 of `slots`, those of a prompt side by side) and of their prompts.

    soft: its prefix is put before the keys of every prompt. batch: the content of the next forward; set before it.
    """

    def __init__(self, slots: int, max_new: int, soft: SoftPrompt = NO_SOFT_PROMPT) -> None:
        self.slots, self.max_new, self.soft = slots, max_new, soft
        self.batch: PromptBatch | TokenBatch | None = None
        self._prompts: dict[int, dict[int, KeysValues]] = {}  # layer -> prompt -> (L, kv_heads, head_dim) each
        self._joined: dict[int, tuple[list[int], KeysValues]] = {}  # layer -> prompts, result of `joined` for them
        self._own: dict[int, KeysValues] = {}  # layer -> (slots, room, kv_heads, head_dim) each

    def holds(self, prompt: int) -> bool:
        """Whether keys and values of this prompt are stored."""
        return any(prompt in stored for stored in self._prompts.values())

    def tensors(self) -> list[Tensor]:
        """All keys and values it stores."""
        by_prompt = [pair for stored in self._prompts.values() for pair in stored.values()]
        return [
            x for pair in (*by_prompt, *(pair for _, pair in self._joined.values()), *self._own.values()) for x in pair
        ]

    def keep(self, prompts: set[int]) -> None:
        """Free the keys and values of all other prompts."""
        for stored in self._prompts.values():
            for prompt in stored.keys() - prompts:
                del stored[prompt]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` own keys and values of some rows into other slots."""
        for buffers in self._own.values():
            for buffer in buffers:
                buffer[targets, :length] = buffer[sources, :length]

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> list[KeysValues]:
        """Keep the (1, kv_heads, T, head_dim) of a PromptBatch behind the prefix -> (L, kv_heads, head_dim) each."""
        split = zip(*(x[0].transpose(0, 1).split(self.batch.lengths) for x in (key, value)), strict=True)
        prefix = self.soft.layer(layer, key.dtype)
        if prefix is None:
            # Copies: a view would keep the whole row in memory as long as one of its prompts.
            pairs = [tuple(x.clone(memory_format=torch.contiguous_format) for x in pair) for pair in split]
        else:
            k0, v0 = (x[0].transpose(0, 1) for x in prefix)
            pairs = [(torch.cat([k0, k]), torch.cat([v0, v])) for k, v in split]
        self._prompts.setdefault(layer, {}).update(zip(self.batch.prompts, pairs, strict=True))
        return pairs

    def prompt(self, layer: int, number: int) -> KeysValues:
        """Of one prompt: (L, kv_heads, head_dim) each."""
        return self._prompts[layer][number]

    def joined(self, layer: int) -> KeysValues:
        """Of all prompts of a TokenBatch, end to end: (sum of L, kv_heads, head_dim) each."""
        prompts = [group.prompt for group in self.batch.groups]
        if layer not in self._joined or self._joined[layer][0] != prompts:
            stored, lengths = self._prompts[layer], [group.length for group in self.batch.groups]
            key, value = (torch.cat([stored[p][i] for p in prompts]) for i in range(2))
            # The single prompts become views of the whole, so that nothing is stored twice.
            stored.update(zip(prompts, zip(key.split(lengths), value.split(lengths), strict=True), strict=True))
            self._joined[layer] = prompts, (key, value)
        return self._joined[layer][1]

    def store_own(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Add the (1, kv_heads, R, head_dim) of a TokenBatch -> the buffers, (slots, room, kv_heads, head_dim) each."""
        buffers = self._own.get(layer)
        if buffers is None or buffers[0].shape[1] <= self.batch.most_generated:
            room = min(self.max_new, 2 * buffers[0].shape[1] if buffers else ROOM)
            # Zeros, not empty: masked values are still multiplied by 0, and 0 times NaN is NaN.
            larger = tuple(x.new_zeros(self.slots, room, x.shape[1], x.shape[3]) for x in (key, value))
            for new, old in zip(larger, buffers or (), strict=False):
                new[:, : old.shape[1]] = old
            self._own[layer] = buffers = larger
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[self.batch.rows, self.batch.places] = new[0].transpose(0, 1)
        return buffers


def sampler_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: SamplerCache, layer: LayerAttention, sinks: Tensor | None = None
) -> Tensor:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D), for the forward that `cache.batch` describes.

    sinks (H,): learned logits, each of which takes a share of its head's attention (gpt-oss).
    """
    if isinstance(cache.batch, PromptBatch):
        out, lse = _prompt_tokens(query, key, value, cache, layer)
    else:
        flash = blockwise.varlen_applies(query, key, value, layer.softcap)
        rows, buffers = query[0].transpose(0, 1), cache.store_own(layer.index, key, value)
        own, own_lse = (_own_varlen if flash else _own)(rows, *buffers, cache.batch, layer)
        if flash and cache.batch.sees_prompts(layer.window):
            keys_values, bounds = cache.joined(layer.index), cache.batch.group_bounds
            prompt, prompt_lse = varlen_attention(rows, *keys_values, bounds, layer.scale, UNBOUNDED)
        else:
            prompt, prompt_lse = _shared(rows, cache, layer)
        share = torch.sigmoid(prompt_lse - own_lse, out=torch.empty_like(own_lse, dtype=own.dtype))
        out = own.lerp_(prompt, share[..., None])
        lse = None if sinks is None else torch.logaddexp(own_lse, prompt_lse)
    if sinks is not None:
        out = (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)
    return out[None]


def _prompt_tokens(query: Tensor, key: Tensor, value: Tensor, cache: SamplerCache, layer: LayerAttention):
    """Each token sees the prefix and its prompt up to itself. -> (T, H, D), log-sum-exp (T, H)."""
    stored = cache.store_prompts(layer.index, key, value)
    if blockwise.varlen_applies(query, key, value, layer.softcap):
        k, v = (torch.cat(x) for x in zip(*stored, strict=True))
        return varlen_attention(query[0].transpose(0, 1), k, v, cache.batch.bounds, layer.scale, layer.window_size)
    outs, lses = [], []
    groups = query.shape[1] // key.shape[1]
    for queries, pair in zip(query.split(cache.batch.lengths, 2), stored, strict=True):
        k, v = (x.transpose(0, 1)[None].repeat_interleave(groups, 1) for x in pair)
        position = k.shape[2] - queries.shape[2]
        for q in queries.split(QUERY_ROWS, 2):
            start, stop = max(0, position + 1 - layer.window) if layer.window else 0, position + q.shape[2]
            places = torch.arange(start, stop, device=q.device)
            mask = visible(places[position - start :], places, layer.window)[None, None]
            out, lse = block_attention(q, k[:, :, start:stop], v[:, :, start:stop], layer.scale, mask, layer.softcap)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].T)
            position = stop
    return torch.cat(outs), torch.cat(lses)


def _own(rows: Tensor, key: Tensor, value: Tensor, batch: TokenBatch, layer: LayerAttention):
    """rows (R, H, D) on the buffers (slots, room, Hkv, D) -> (R, H, D), log-sum-exp (R, H)."""
    k, v = (x[: len(rows), : batch.most_generated + 1].transpose(1, 2) for x in (key, value))
    q = rows.unflatten(1, (k.shape[1], -1))
    out, lse = block_attention(q, k, v, layer.scale, batch.own_mask(layer.window), layer.softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _own_varlen(rows: Tensor, key: Tensor, value: Tensor, batch: TokenBatch, layer: LayerAttention):
    """As `_own`: the kernel reads as many keys of each slot as the row has."""
    k, v = (x[: len(rows)].flatten(0, 1) for x in (key, value))
    # No window where it would exclude nothing: the kernel is faster without.
    window_size = layer.window_size if layer.window and layer.window <= batch.most_generated else UNBOUNDED
    return varlen_attention(rows, k, v, batch.own_bounds(key.shape[1]), layer.scale, window_size, batch.own_keys)


def _shared(rows: Tensor, cache: SamplerCache, layer: LayerAttention):
    """rows (R, H, D) on the keys of their prompts -> (R, H, D), log-sum-exp (R, H)."""
    outs, lses = [], []
    for group in cache.batch.groups:
        k, v = (x.transpose(0, 1)[None] for x in cache.prompt(layer.index, group.prompt))
        count = group.stop - group.start
        # The samples, times the heads that share keys, are the queries of one block.
        q = rows[group.start : group.stop].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]
        mask = cache.batch.prompt_mask(group, layer.window)
        if mask is not None:
            mask = mask.repeat(q.shape[2] // count, 1)[None, None]
        out, lse = block_attention(q, k, v, layer.scale, mask, layer.softcap)
        outs.append(out[0].unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2))
        lses.append(lse[0].unflatten(1, (-1, count)).permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(lses)
