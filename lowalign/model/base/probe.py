"""A test whether packed attention is exact for an architecture.

A few random tokens through the real weights cannot show it: ignoring a sliding window or a soft cap changes the logits by
5e-7 there. So the test builds a two-layer fp32 model of the same class, with a window of 8 and large weights
(N(0, (1.5/sqrt(fan_in))²)). It compares log-probs of packed rows by our kernels with those of single rows by the model's
own attention and logits.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from lowalign.data.pack import Example, pack
from lowalign.model.attention.interface import ATTN_IMPLEMENTATION, UnsupportedAttentionError, no_mask
from lowalign.model.attention.packed import Layout
from lowalign.model.forward.logprob import LMHead, token_logprobs

WINDOW = 8
TOLERANCE = 1e-3  # times the std of the log-probs; correct: 4e-6, ignored window: 5, ignored soft cap: 2e-2


def probe(config: PretrainedConfig) -> tuple[bool, str]:
    """(True, "") when log-probs of packed rows equal those of single rows; (False, reason) otherwise."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return False, f"its layers are of type {', '.join(sorted(kinds))}"
    try:
        model = small_model(text)
        packed, rows = _packed(model), _rows(model)
    except UnsupportedAttentionError as error:
        return False, f"its attention uses {error}"
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return False, f"the probe model failed: {type(error).__name__}: {reason}"
    difference = ((packed - rows).abs().max() / rows.std()).item()
    if not difference < TOLERANCE:
        return False, f"packed log-probs of {text.model_type} differ from its own by {difference:.1e} of their spread"
    return True, ""


def small_model(config: PretrainedConfig) -> nn.Module:
    """A model of the same class with two layers, one of each layer type, and the same head size and groups of heads."""
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layer_types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    changes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": 2,
        "head_dim": size,
        "hidden_size": 2 * groups * size,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_local_experts": max(2, getattr(config, "num_experts_per_tok", None) or 2),
        "vocab_size": 128,
        "sliding_window": WINDOW if getattr(config, "sliding_window", None) else None,
        "layer_types": (layer_types * 2)[:2] or None,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    for key, value in changes.items():
        if getattr(small, key, None) is not None:
            setattr(small, key, value)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=False)
        model = model.eval().requires_grad_(False)
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model


def probe_examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 128, (n,), generator=generator).tolist()  # noqa: E731
    return [Example(draw(14), [draw(11), draw(9)]), Example(draw(5), [draw(12)]), Example([], [draw(10)])]


@torch.no_grad()
def _packed(model: nn.Module) -> Tensor:
    model.set_attn_implementation(ATTN_IMPLEMENTATION)
    row = pack(probe_examples())
    with no_mask():
        hidden = model.base_model(
            input_ids=row.ids[None], position_ids=row.positions[None], use_cache=False, layout=Layout(row.segments)
        ).last_hidden_state[0]
    return token_logprobs(hidden[row.predictors], LMHead.of(model), row.labels)[0]


@torch.no_grad()
def _rows(model: nn.Module) -> Tensor:
    model.set_attn_implementation("eager")
    logps = []
    for example in probe_examples():
        for completion in example.completions:
            ids = torch.tensor(example.prompt + completion)
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            logps.append(logp[max(len(example.prompt) - 1, 0) :])
    return torch.cat(logps)
