"""Attention of the sampler: n samples of a prompt share its keys and values, which are computed and kept once.

A forward is either a row of whole prompts, or one token of each live sample. A sample's token attends to the keys of its
prompt and to its own, as two separate blocks: all samples of a prompt are queries of one block, and the two results are
joined by their log-sum-exps, which is exact.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from lowalign.model import blockwise
from lowalign.model.blockwise import attend, cumulative, varlen, visible

KeysValues = tuple[Tensor, Tensor]
CHUNK = 512  # queries of a prompt computed at a time where scores are held in memory
ROOM = 64  # tokens that a sample's key buffer starts with; it doubles when they are used up


@dataclass
class Prompts:
    """The forward of whole prompts: (prompt, tokens) in row order."""

    lengths: list[tuple[int, int]]


@dataclass
class Tokens:
    """The forward of one token for each of R samples. prompts, ages: per row, its prompt and its earlier own tokens."""

    prompts: list[int]
    ages: list[int]
    device: torch.device
    masks: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.oldest = max(self.ages)
        self.row = torch.arange(len(self.ages), device=self.device)
        self.age = torch.tensor(self.ages, device=self.device)
        # Rows by prompt, as (prompt, start, stop) in that order, and the way back.
        order = sorted(range(len(self.prompts)), key=self.prompts.__getitem__)
        self.order = torch.tensor(order, device=self.device)
        self.inverse = self.order.argsort()
        self.sorted_ages = [self.ages[r] for r in order]
        starts = [i for i, r in enumerate(order) if not i or self.prompts[r] != self.prompts[order[i - 1]]]
        stops = [*starts[1:], len(order)]
        self.groups = [(self.prompts[order[a]], a, b) for a, b in zip(starts, stops, strict=True)]

    @cached_property
    def group_bounds(self) -> Tensor:
        """(groups + 1,) int32: where each prompt's rows begin in `order`."""
        return cumulative([b - a for _, a, b in self.groups], self.device)

    def own_mask(self, window: int | None) -> Tensor | None:
        """(R, 1, 1, oldest + 1): which of its own keys each row sees; None when all see all."""
        if not (window and window <= self.oldest) and min(self.ages) == self.oldest:
            return None
        if ("own", window) not in self.masks:
            seen = visible(self.age, torch.arange(self.oldest + 1, device=self.device), window)
            self.masks["own", window] = seen[:, None, None]
        return self.masks["own", window]

    def sees_whole(self, start: int, stop: int, length: int, window: int | None) -> bool:
        """Whether these rows (of `order`) all see all `length` keys of their prompt."""
        return not window or length + max(self.sorted_ages[start:stop]) < window

    def prompt_mask(self, start: int, stop: int, length: int, window: int | None) -> Tensor | None:
        """(rows, length): which keys of their prompt rows start..stop (of `order`) see; None when all see all."""
        if self.sees_whole(start, stop, length, window):
            return None
        if (start, window) not in self.masks:
            at = length + self.age[self.order[start:stop]]
            self.masks[start, window] = visible(at, torch.arange(length, device=self.device), window)
        return self.masks[start, window]


class Rollout:
    """Keys and values of live samples (rows 0..R-1 of `slots`, in any order) and of their prompts.

    prefix: for each layer keys and values (1, kv_heads, p, head_dim) that stand before every prompt (prefix tuning).
    now: what the next forward holds; set it before the forward.
    """

    def __init__(self, slots: int, max_new: int, prefix: list[KeysValues] | None = None) -> None:
        self.slots, self.max_new, self.prefix = slots, max_new, prefix
        self.now: Prompts | Tokens | None = None
        self._prompts: dict[int, dict[int, KeysValues]] = {}  # layer -> prompt -> (L, kv_heads, head_dim) each
        self._own: dict[int, KeysValues] = {}  # layer -> (slots, room, kv_heads, head_dim) each
        self._joined: dict[int, tuple[list[int], Tensor, Tensor]] = {}  # layer -> prompts, all their keys, values

    @property
    def computed(self) -> set[int]:
        """The prompts whose keys and values are here."""
        return set(next(iter(self._prompts.values()), ()))

    def keep(self, prompts: set[int]) -> None:
        """Give back the memory of all other prompts."""
        for stored in self._prompts.values():
            for prompt in stored.keys() - prompts:
                del stored[prompt]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` own keys and values of some rows into other slots."""
        for stores in self._own.values():
            for store in stores:
                store[targets, :length] = store[sources, :length]

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> list[KeysValues]:
        """Keep what the Prompts of `now` have, given (1, kv_heads, T, head_dim); returns it, (L, kv_heads, head_dim) each."""
        lengths = [n for _, n in self.now.lengths]
        pieces = [x[0].transpose(0, 1).split(lengths) for x in (key, value)]
        if self.prefix is not None:
            ahead = [p[0].transpose(0, 1).to(x) for p, x in zip(self.prefix[layer], (key, value), strict=True)]
            pieces = [[torch.cat([p, x]) for x in split] for p, split in zip(ahead, pieces, strict=True)]
        else:
            pieces = [[x.contiguous() for x in split] for split in pieces]
        found = list(zip(*pieces, strict=True))
        stored = self._prompts.setdefault(layer, {})
        stored.update({prompt: kv for (prompt, _), kv in zip(self.now.lengths, found, strict=True)})
        return found

    def prompt(self, layer: int, prompt: int) -> KeysValues:
        """(L, kv_heads, head_dim) each."""
        return self._prompts[layer][prompt]

    def joined(self, layer: int) -> KeysValues:
        """Keys and values of all prompts of `now`, end to end: (sum of L, kv_heads, head_dim) each."""
        wanted = [prompt for prompt, _, _ in self.now.groups]
        if layer not in self._joined or self._joined[layer][0] != wanted:
            stored = self._prompts[layer]
            lengths = [len(stored[p][0]) for p in wanted]
            key, value = (torch.cat([stored[p][i] for p in wanted]) for i in range(2))
            # From now on they are views of the whole: nothing is held twice.
            stored.update(zip(wanted, zip(key.split(lengths), value.split(lengths), strict=True), strict=True))
            self._joined[layer] = wanted, key, value
        return self._joined[layer][1:]

    def store_own(self, layer: int, key: Tensor, value: Tensor) -> KeysValues:
        """Add this forward's (1, kv_heads, R, head_dim); returns the buffers, (slots, room, kv_heads, head_dim) each."""
        stores = self._own.get(layer)
        if stores is None or stores[0].shape[1] <= self.now.oldest:
            room = min(self.max_new, 2 * stores[0].shape[1] if stores else ROOM)
            # Zeros: what is masked is still multiplied by 0, and a NaN would stay one.
            larger = tuple(x.new_zeros(self.slots, room, x.shape[1], x.shape[3]) for x in (key, value))
            for old, new in zip(stores or (), larger, strict=False):
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
    rollout: Rollout,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D), for the forward that `rollout.now` describes.

    s_aux (H,): learned sinks, which take a share of each head's attention.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    compute = _prompts if isinstance(rollout.now, Prompts) else _tokens
    out, lse = compute(rollout, module.layer_idx, query, key, value, scale, sliding_window, softcap)
    if s_aux is not None:
        out = out * torch.sigmoid(lse - s_aux)[..., None]
    return out.to(query.dtype)[None], None


def _prompts(rollout: Rollout, layer: int, query, key, value, scale: float, window: int | None, softcap: float | None):
    """Each token sees the prefix and its prompt up to itself. -> (T, H, D), log-sum-exp (T, H)."""
    stored = rollout.store_prompts(layer, key, value)
    lengths = [n for _, n in rollout.now.lengths]
    if blockwise.varlen_applies(query, key, value, softcap):
        keys, values = (torch.cat(x) for x in zip(*stored, strict=True))
        spans = [len(k) for k, _ in stored]
        bounds = cumulative(lengths, query.device), cumulative(spans, query.device), max(lengths), max(spans)
        # The kernel's window counts the tokens to the left, a model's counts the token itself too.
        return varlen(query[0].transpose(0, 1), keys, values, *bounds, scale, (window - 1 if window else -1, 0))
    outs, sums = [], []
    fold = query.shape[1] // key.shape[1]
    for queries, (keys, values) in zip(query.split(lengths, 2), stored, strict=True):
        k, v = (x.transpose(0, 1)[None].repeat_interleave(fold, 1) for x in (keys, values))
        at = len(keys) - queries.shape[2]
        for q in queries.split(CHUNK, 2):
            stop = at + q.shape[2]
            start = max(0, at + 1 - window) if window else 0
            places = torch.arange(start, stop, device=q.device)
            mask = visible(places[at - start :], places, window)[None, None]
            out, lse = attend(q, k[:, :, start:stop], v[:, :, start:stop], scale, mask, softcap)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0].T)
            at = stop
    return torch.cat(outs), torch.cat(sums)


def _tokens(rollout: Rollout, layer: int, query, key, value, scale: float, window: int | None, softcap: float | None):
    """Each row sees its prompt and its own tokens. -> (R, H, D), log-sum-exp (R, H)."""
    fast = blockwise.varlen_applies(query, key, value, softcap)
    rows = query[0].transpose(0, 1)
    own = rollout.store_own(layer, key, value)
    mine, mine_lse = (_own_varlen if fast else _own)(rollout.now, rows, *own, scale, window, softcap)
    order, inverse = rollout.now.order, rollout.now.inverse
    whole = all(
        rollout.now.sees_whole(a, b, len(rollout.prompt(layer, p)[0]), window) for p, a, b in rollout.now.groups
    )
    shared = _shared_varlen if fast and whole else _shared
    theirs, theirs_lse = (x[inverse] for x in shared(rollout, layer, rows[order], scale, window, softcap))
    out = mine.float().lerp(theirs.float(), torch.sigmoid(theirs_lse - mine_lse)[..., None])
    return out, torch.logaddexp(mine_lse, theirs_lse)


def _own(now: Tokens, rows: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None):
    """rows (R, H, D) on the buffers (slots, room, Hkv, D) -> (R, H, D), log-sum-exp (R, H)."""
    k, v = (x[: len(rows), : now.oldest + 1].transpose(1, 2) for x in (key, value))
    q = rows.unflatten(1, (k.shape[1], -1))
    out, lse = attend(q, k, v, scale, now.own_mask(window), softcap)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _own_varlen(now: Tokens, rows: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, _softcap):
    """As `_own`: one query per row, of whose slot the kernel reads as many keys as the row has."""
    count, room = len(rows), key.shape[1]
    bounds = torch.arange(count + 1, device=rows.device, dtype=torch.int32)
    keys, values = (x[:count].flatten(0, 1) for x in (key, value))
    span = (window - 1, 0) if window and window <= now.oldest else (-1, -1)
    used = (now.age + 1).int()
    return varlen(rows, keys, values, bounds, bounds * room, 1, now.oldest + 1, scale, span, used)


def _shared(rollout: Rollout, layer: int, rows: Tensor, scale: float, window: int | None, softcap: float | None):
    """rows (R, H, D), sorted by prompt, on the keys of their prompts -> (R, H, D), log-sum-exp (R, H)."""
    outs, sums = [], []
    for prompt, start, stop in rollout.now.groups:
        key, value = rollout.prompt(layer, prompt)
        count, heads = stop - start, key.shape[1]
        # The samples, times the heads that share keys, are the queries of one block.
        q = rows[start:stop].unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)[None]
        k, v = (x.transpose(0, 1)[None] for x in (key, value))
        mask = rollout.now.prompt_mask(start, stop, len(key), window)
        if mask is not None:
            mask = mask.repeat(q.shape[2] // count, 1)[None, None]
        out, lse = attend(q, k, v, scale, mask, softcap)
        outs.append(out[0].unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2))
        sums.append(lse[0].unflatten(1, (-1, count)).permute(2, 0, 1).flatten(1, 2))
    return torch.cat(outs), torch.cat(sums)


def _shared_varlen(rollout: Rollout, layer: int, rows: Tensor, scale: float, _window, _softcap):
    """As `_shared`, where every row sees its whole prompt: one call for all prompts."""
    now = rollout.now
    lengths = [len(rollout.prompt(layer, prompt)[0]) for prompt, _, _ in now.groups]
    longest = max(stop - start for _, start, stop in now.groups), max(lengths)
    key, value = rollout.joined(layer)
    return varlen(rows, key, value, now.group_bounds, cumulative(lengths, rows.device), *longest, scale, (-1, -1))
