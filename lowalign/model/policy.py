"""What a run starts from: a fresh adapter, an earlier one under it, or a copy of it; and what that start must be.

The policy is a stack of adapters of which the last is trained. Where it equals its reference by construction (a fresh
LoRA, a copy), that is asserted bit for bit before the first step; a fresh soft prompt moves the base, and its
Kullback-Leibler divergence is told.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowalign.config.sections import AdapterConfig
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.kinds import BY_OPTION
from lowalign.model.forward.logprob import Head
from lowalign.model.forward.packed import hidden_states, pack_behind
from lowalign.model.host import Host

POLICY, INIT = "policy", "init"
KL_TOKENS = 256  # tokens the divergence is averaged over


def add_fresh(host: Host, name: str, adapter: AdapterConfig, under: tuple[str, ...]) -> None:
    """Add a new adapter; under: the stack it is put on. Raises UserError where the options do not fit together."""
    kind = BY_OPTION[adapter.kind]
    if adapter.init_text and not kind.soft:
        raise UserError(f"--adapter.init-text is for soft prompts; with --adapter.kind {adapter.kind}, leave it out")
    host.add(name, kind.peft_config(adapter))
    if adapter.init_text:
        with host.use(*under):
            host.adapters[name].init_from_text(adapter.init_text)


def load_stack(host: Host, name: str, source: str, allow_base_mismatch: bool = False) -> tuple[str, ...]:
    """Load an adapter together with those it was trained on top of -> their names in the order they stack."""
    folder = adapter_files.locate(source)
    _, meta = adapter_files.read(folder)
    parents = tuple(f"{name}-{i}" for i in range(meta.get("parents", 0)))
    for i, parent in enumerate(parents):
        host.load(parent, folder / "parents" / str(i), allow_base_mismatch)
    host.load(name, folder, allow_base_mismatch)
    return (*parents, name)


def load_policy(host: Host, adapters: Sequence[str], allow_base_mismatch: bool = False) -> tuple[str, ...]:
    """Load runs, adapter folders or Hub ids, each with what it was trained on top of -> their names, as they stack."""
    return tuple(
        name
        for i, adapter in enumerate(adapters)
        for name in load_stack(host, f"adapter{i}", adapter, allow_base_mismatch)
    )


def start_policy(
    host: Host, adapter: AdapterConfig, init: str | None, init_mode: str, seed: int, allow_base_mismatch: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Add the policy to the host -> (its stack, whose last is trained, the stack it started from: its reference).

    A LoRA is put on the frozen `init` (or copied with init_mode "copy"); a soft prompt is always copied onto a soft prompt.
    Raises UserError when `init` and the adapter do not go together.
    """
    torch.manual_seed(seed)
    kind = BY_OPTION[adapter.kind]
    if init is None:
        add_fresh(host, POLICY, adapter, ())
        return (POLICY,), ()
    reference = load_stack(host, INIT, init, allow_base_mismatch)
    init_kind = type(host.adapters[INIT])
    if init_mode == "copy" or (init_kind.soft and kind.soft):
        if init_kind is not kind:
            kinds = f"{init_kind.peft_type}, not {kind.peft_type}"
            raise UserError(f"--init {init} cannot be copied: it is {kinds}; set --adapter.kind to its kind")
        if adapter.init_text:
            raise UserError(
                f"the adapter is a copy of --init {init}, and --adapter.init-text starts a fresh one; leave one out"
            )
        host.load(POLICY, adapter_files.locate(init), allow_base_mismatch)
        return (*reference[:-1], POLICY), reference
    add_fresh(host, POLICY, adapter, reference)
    return (*reference, POLICY), reference


def check_start(host: Host, policy: tuple[str, ...], reference: tuple[str, ...], examples: Sequence[Example]) -> str:
    """Before the first step: assert that the policy is its reference where it must be; return a line for the user.

    Raises RuntimeError when a policy that equals its reference by construction does not: a bug, not the user's doing.
    """
    host.training(None)
    examples = [_shortened(e) for e in examples[:4]]
    adapter = host.adapters[policy[-1]]
    copied = policy[:-1] != reference
    if copied or adapter.identity_at_start:
        with torch.no_grad():
            with host.use(*policy):
                ours = torch.cat([t for row in host.logprobs(examples) for t in row])
            with host.use(*reference):
                theirs = torch.cat([t for row in host.logprobs(examples) for t in row])
        if not (torch.equal(ours, theirs) if copied else adapter.is_identity(ours, theirs)):
            worst = (ours - theirs).abs().max().item()
            raise RuntimeError(
                f"before the first step the policy must equal its reference; log-probs differ by {worst:.1e}"
            )
        return f"the {adapter.peft_type} starts as its reference: log-probs equal on {len(examples)} examples"
    kl = mean_kl(host, reference, policy, examples)
    return f"the fresh soft prompt starts at a divergence of {kl:.2f} nats a token from its reference"


@torch.no_grad()
def mean_kl(host: Host, p: tuple[str, ...], q: tuple[str, ...], examples: Sequence[Example]) -> float:
    """KL(p ‖ q) in nats, averaged over the completion tokens of the examples (at most KL_TOKENS of them), exact over the
    vocabulary. nan where the model cannot be packed."""
    if not host.base.packed:
        return float("nan")
    logps = []
    for names in (p, q):
        with host.use(*names):
            soft = host.soft_prompt()
            row = pack_behind(soft, examples, host.base.model)
            hidden = hidden_states(host.base.model, row, soft)[row.predictors[:KL_TOKENS]]
            logps.append(Head.of(host.base.model).logits(hidden).log_softmax(-1))
    return (logps[0].exp() * (logps[0] - logps[1])).sum(-1).mean().item()


def _shortened(example: Example, length: int = 512) -> Example:
    """Enough of an Example for a check: its prompt's end and its completions' beginnings."""
    completions = [c[:length] for c in example.completions]
    return replace(example, prompt=example.prompt[-length:], completions=completions, masks=None)
