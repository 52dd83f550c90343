"""Attention of the sampler: n samples of a prompt share its keys and values, which are computed and kept once.

A forward is either a row of whole prompts, or one token of each live sample. A sample's token attends to the keys of its
prompt and to its own as two separate blocks: all samples of a prompt are queries of one block, and the two results are
joined by their log-sum-exps, which is exact.
"""

import torch
from torch import Tensor, nn

from lowalign.model.attention import blockwise
from lowalign.model.attention.blockwise import attend, varlen, visible
from lowalign.model.attention.sampler_layout import Prompts, Tokens
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, KeysValues, SoftPrompt

CHUNK = 512  # queries of a prompt computed at a time where their scores are held in memory
ROOM = 64  # tokens a sample's key buffer starts with; it doubles when they are used up


class SamplerCache:
    """Keys and values of live samples (rows 0..R-1 of `slots`, in any order) and of their prompts.

    soft: its keys and values stand before those of every prompt.
    now: what the next forward holds; set it before the forward.
    """

    def __init__(self, slots: int, max_new: int, soft: SoftPrompt = NO_SOFT_PROMPT) -> None:
        self.slots, self.max_new, self.soft = slots, max_new, soft
        self.now: Prompts | Tokens | None = None
        self._prompts: dict[int, dict[int, KeysValues]] = {}  # layer -> prompt -> (L, kv_heads, head_dim) each
        self._joined: dict[int, tuple[list[int], KeysValues]] = {}  # layer -> prompts, what `joined` made of them
        self._own: dict[int, KeysValues] = {}  # layer -> (slots, room, kv_heads, head_dim) each

    def holds(self, prompt: int) -> bool:
        """Whether keys and values of this prompt are here."""
        return any(prompt in stored for stored in self._prompts.values())

    def keep(self, prompts: set[int]) -> None:
        """Give up all other prompts."""
        for stored in self._prompts.values():
            for prompt in stored.keys() - prompts:
                del stored[prompt]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` own keys and values of some rows into other slots."""
        for stores in self._own.values():
            for store in stores:
                store[targets, :length] = store[sources, :length]

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> list[KeysValues]:
        """Keep the (1, kv_heads, T, head_dim) of Prompts, the prefix in front; returns (L, kv_heads, head_dim) each."""
        split = zip(*(x[0].transpose(0, 1).split(self.now.lengths) for x in (key, value)), strict=True)
        prefix = self.soft.layer(layer, key.dtype)
        if prefix is None:
            # Copies: a view would keep the whole row in memory as long as one of its prompts.
            pairs = [tuple(x.clone(memory_format=torch.contiguous_format) for x in pair) for pair in split]
        else:
            k0, v0 = (x[0].transpose(0, 1) for x in prefix)
            pairs = [(torch.cat([k0, k]), torch.cat([v0, v])) for k, v in split]
        self._prompts.setdefault(layer, {}).update(zip(self.now.numbers, pairs, strict=True))
        return pairs

    def prompt(self, layer: int, number: int) -> KeysValues:
        """(L, kv_heads, head_dim) each."""
        return self._prompts[layer][number]

    def joined(self, layer: int) -> KeysValues:
        """Those of all prompts of Tokens, end to end: (sum of L, kv_heads, head_dim) each."""
        wanted = [group.prompt for group in self.now.groups]
        if layer not in self._joined or self._joined[layer][0] != wanted:
            stored, lengths = self._prompts[layer], [group.length for group in self.now.groups]
            key, value = (torch.cat([stored[p][i] for p in wanted]) for i in range(2))
            # From now on the single ones are views of the whole: nothing is held twice.
            stored.update(zip(wanted, zip(key.split(lengths), value.split(lengths), strict=True), strict=True))
            self._joined[layer] = wanted, (key, value)
        return self._joined[layer][1]

    def store_own(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Add the (1, kv_heads, R, head_dim) of Tokens; returns the buffers, (slots, room, kv_heads, head_dim) each."""
        stores = self._own.get(layer)
        if stores is None or stores[0].shape[1] <= self.now.oldest:
            room = min(self.max_new, 2 * stores[0].shape[1] if stores else ROOM)
            # Zeros: what is masked is still multiplied by 0, and a NaN would stay one.
            larger = tuple(x.new_zeros(self.slots, room, x.shape[1], x.shape[3]) for x in (key, value))
            for new, old in zip(larger, stores or (), strict=False):
                new[:, : old.shape[1]] = old
            self._own[layer] = stores = larger
        for store, new in zip(stores, (key, value), strict=True):
            store[self.now.row, self.now.age] = new[0].transpose(0, 1)
        return stores


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    rollout: SamplerCache,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D), for the forward that `rollout.now` describes.

    s_aux (H,): learned sinks, each of which takes a share of its head's attention.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    compute = _prompts if isinstance(rollout.now, Prompts) else _tokens
    out, lse = compute(rollout, module.layer_idx, query, key, value, scale, sliding_window, softcap)
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux)[..., None]
    return out.to(query.dtype)[None], None


def _prompts(
    rollout: SamplerCache, layer: int, query, key, value, scale: float, window: int | None, softcap: float | None
):
    """Each token sees the prefix and its prompt up to itself. -> (T, H, D), log-sum-exp (T, H)."""
    stored = rollout.store_prompts(layer, key, value)
    if blockwise.varlen_applies(query, key, value, softcap):
        k, v = (torch.cat(x) for x in zip(*stored, strict=True))
        # The kernel's window counts the tokens to the left, a model's counts the token itself too.
        return varlen(query[0].transpose(0, 1), k, v, *rollout.now.bounds, scale, (window - 1 if window else -1, 0))
    outs, sums = [], []
    fold = query.shape[1] // key.shape[1]
    for queries, pair in zip(query.split(rollout.now.lengths, 2), stored, strict=True):
        k, v = (x.transpose(0, 1)[None].repeat_interleave(fold, 1) for x in pair)
        at = k.shape[2] - queries.shape[2]
        for q in queries.split(CHUNK, 2):
            start, stop = max(0, at + 1 - window) if window else 0, at + q.shape[2]
            places = torch.arange(start, stop, device=q.device)
            mask = visible(places[at - start :], places, window)[None, None]
            out, lse = attend(q, k[:, :, start:stop], v[:, :, start:stop], scale, mask, softcap)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0].T)
            at = stop
    return torch.cat(outs), torch.cat(sums)


def _tokens(
    rollout: SamplerCache, layer: int, query, key, value, scale: float, window: int | None, softcap: float | None
):
    """Each row sees its prompt and its own tokens. -> (R, H, D), log-sum-exp (R, H)."""
    now, rows = rollout.now, query[0].transpose(0, 1)
    own = rollout.store_own(layer, key, value)
    fast = blockwise.varlen_applies(query, key, value, softcap)
    if fast:
        mine, mine_lse = _own_varlen(now, rows, *own, scale, window)
    else:
        mine, mine_lse = _own(now, rows, *own, scale, window, softcap)
    ordered = rows[now.order]
    if fast and now.sees_prompts(window):
        shared = varlen(ordered, *rollout.joined(layer), *now.group_bounds, scale, (-1, -1))
    else:
        shared = _shared(rollout, layer, ordered, scale, window, softcap)
    theirs, theirs_lse = (x[now.inverse] for x in shared)
    share = torch.sigmoid(theirs_lse - mine_lse)[..., None]
    out = mine.to(share.dtype).lerp(theirs.to(share.dtype), share)
    return out, torch.logaddexp(mine_lse, theirs_lse)


def _own(
    now: Tokens, rows: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
):
    """rows (R, H, D) on the buffers (slots, room, Hkv, D) -> (R, H, D), log-sum-exp (R, H)."""
    k, v = (x[: len(rows), : now.oldest + 1].transpose(1, 2) for x in (key, value))
    q = rows.unflatten(1, (k.shape[1], -1))
    out, lse = attend(q, k, v, scale, now.own_mask(window), softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _own_varlen(now: Tokens, rows: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None):
    """As `_own`: of each slot the kernel reads as many keys as the row has."""
    k, v = (x[: len(rows)].flatten(0, 1) for x in (key, value))
    # Without need of it no window: the kernel is faster so.
    reach = (window - 1, 0) if window and window <= now.oldest else (-1, -1)
    key_bounds, used = now.own_bounds * key.shape[1], (now.age + 1).int()
    return varlen(rows, k, v, now.own_bounds, key_bounds, 1, now.oldest + 1, scale, reach, used)


def _shared(rollout: SamplerCache, layer: int, rows: Tensor, scale: float, window: int | None, softcap: float | None):
    """rows (R, H, D), ordered by prompt, on the keys of their prompts -> (R, H, D), log-sum-exp (R, H)."""
    outs, sums = [], []
    for group in rollout.now.groups:
        k, v = (x.transpose(0, 1)[None] for x in rollout.prompt(layer, group.prompt))
        count = group.stop - group.start
        # The samples, times the heads that share keys, are the queries of one block.
        q = rows[group.start : group.stop].unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]
        mask = rollout.now.prompt_mask(group, window)
        if mask is not None:
            mask = mask.repeat(q.shape[2] // count, 1)[None, None]
        out, lse = attend(q, k, v, scale, mask, softcap)
        outs.append(out[0].unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2))
        sums.append(lse[0].unflatten(1, (-1, count)).permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(sums)
