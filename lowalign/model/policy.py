"""The policy of a run: a fresh adapter, a fresh one on top of an earlier one, or a copy of an earlier one.

The policy is a stack of adapters; the last one is trained. `initial` is the stack that it starts from. A policy that
equals it by construction (a fresh LoRA, a copy) is checked before the first step. A fresh soft prompt does not equal it;
the KL divergence between the two is logged.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lowalign.config.sections import AdapterConfig
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.model.adapters import files as adapter_files
from lowalign.model.adapters.kinds import BY_OPTION, peft_config
from lowalign.model.forward.logprob import LMHead
from lowalign.model.forward.packed import hidden_states, pack_behind
from lowalign.model.host import Host

Stack = tuple[str, ...]  # names of adapters that act together, in the order they stack
POLICY, INIT = "policy", "init"
KL_TOKENS = 256  # at most; tokens the KL divergence is averaged over
CHECK_EXAMPLES, CHECK_TOKENS = 4, 512  # for the check of the start; tokens of each prompt and completion


def add_fresh(host: Host, name: str, options: AdapterConfig, under: Stack) -> None:
    """Add a new adapter on top of the stack `under`. Raises UserError when the options contradict each other."""
    if options.init_text and not BY_OPTION[options.kind].soft:
        raise UserError(f"--adapter.init-text is for soft prompts; with --adapter.kind {options.kind}, leave it out")
    host.add(name, peft_config(options))
    if options.init_text:
        with host.use(*under):
            host.adapters[name].init_from_text(options.init_text)


def load_stack(host: Host, name: str, adapter: str, allow_base_mismatch: bool = False) -> Stack:
    """Load an adapter (run, folder or Hub id) and those it was trained on top of -> their names, the adapter last."""
    folder = adapter_files.locate(adapter)
    _, meta = adapter_files.read(folder)
    parents = tuple(f"{name}-{i}" for i in range(meta.get("parents", 0)))
    for i, parent in enumerate(parents):
        host.load(parent, folder / "parents" / str(i), allow_base_mismatch)
    host.load(name, folder, allow_base_mismatch)
    return (*parents, name)


def load_policy(host: Host, adapters: Sequence[str], allow_base_mismatch: bool = False) -> Stack:
    """Load several adapters, each as `load_stack` does -> all names in order."""
    return tuple(
        name
        for i, adapter in enumerate(adapters)
        for name in load_stack(host, f"adapter{i}", adapter, allow_base_mismatch)
    )


def start_policy(
    host: Host, options: AdapterConfig, init: str | None, init_mode: str, seed: int, allow_base_mismatch: bool = False
) -> tuple[Stack, Stack]:
    """Add the policy to the host -> (its stack, initial: the stack it starts from).

    init: an adapter to start from. The policy is a fresh adapter on top of it; with init_mode "copy", or when both are
    soft prompts, a copy of it. seed: of the initial weights. Raises UserError when `init` and the options do not fit.
    """
    torch.manual_seed(seed)
    kind = BY_OPTION[options.kind]
    if init is None:
        add_fresh(host, POLICY, options, ())
        return (POLICY,), ()
    initial = load_stack(host, INIT, init, allow_base_mismatch)
    init_kind = type(host.adapters[INIT])
    if init_mode == "copy" or (init_kind.soft and kind.soft):
        if init_kind is not kind:
            kinds = f"{init_kind.peft_type}, not {kind.peft_type}"
            raise UserError(f"--init {init} cannot be copied: it is {kinds}; set --adapter.kind to its kind")
        if options.init_text:
            raise UserError(
                f"the adapter is a copy of --init {init}, and --adapter.init-text starts a fresh one; leave one out"
            )
        host.load(POLICY, adapter_files.locate(init), allow_base_mismatch)
        return (*initial[:-1], POLICY), initial
    add_fresh(host, POLICY, options, initial)
    return (*initial, POLICY), initial


def check_start(host: Host, policy: Stack, initial: Stack, examples: Sequence[Example]) -> str:
    """Before the first step, compare the policy with the stack it starts from -> a line for the log.

    Raises RuntimeError when a policy that equals it by construction does not, which is a bug.
    """
    host.training(None)  # dropout off
    host.flat(policy[-1])  # the weights as they are trained, in 16 bit on a 16-bit base
    examples = [_shortened(e) for e in examples[:CHECK_EXAMPLES]]
    adapter = host.adapters[policy[-1]]
    copied = policy[:-1] != initial
    start = "the policy of --init" if initial else "the base"
    if copied or adapter.identity_at_start:
        with torch.no_grad():
            with host.use(*policy):
                logps = torch.cat([t for row in host.logprobs(examples) for t in row])
            with host.use(*initial):
                initial_logps = torch.cat([t for row in host.logprobs(examples) for t in row])
        if not (torch.equal(logps, initial_logps) if copied else adapter.is_identity(logps, initial_logps)):
            worst = (logps - initial_logps).abs().max().item()
            raise RuntimeError(
                f"before the first step the policy must equal its reference; log-probs differ by {worst:.1e}"
            )
        return f"the {adapter.title} starts as {start}: log-probs equal on {len(examples)} examples"
    kl = mean_kl(host, initial, policy, examples)
    return f"the fresh {adapter.title} starts at a KL divergence of {kl:.2f} nats a token from {start}"


@torch.no_grad()
def mean_kl(host: Host, p: Stack, q: Stack, examples: Sequence[Example]) -> float:
    """KL(p ‖ q) in nats, exact over the vocabulary, mean over the first KL_TOKENS completion tokens of the examples.

    nan when the model does not support packing.
    """
    if not host.base.packed:
        return float("nan")
    logps = []
    for names in (p, q):
        with host.use(*names):
            soft = host.soft_prompt()
            row = pack_behind(soft, examples, host.base.model)
            hidden = hidden_states(host.base.model, row, soft)[row.predictors[:KL_TOKENS]]
            logps.append(LMHead.of(host.base.model).logits(hidden).log_softmax(-1))
    return (logps[0].exp() * (logps[0] - logps[1])).sum(-1).mean().item()


def _shortened(example: Example) -> Example:
    """The end of the prompt and the beginnings of the completions."""
    completions = [c[:CHECK_TOKENS] for c in example.completions]
    return replace(
        example, prompt=example.prompt[-CHECK_TOKENS:], completions=completions, masks=None, token_weights=None
    )
