"""Whether a merged model is the one that was trained: both run on the same tokens, their distributions compared."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.prompts import PromptRow, prompt_ids, read_prompts
from lowalign.errors import UserError
from lowalign.export.sources import Sources
from lowalign.log import log
from lowalign.model.attention.soft_prompt import NO_SOFT_PROMPT, SoftPrompt
from lowalign.model.base.base import Base, quiet_transformers
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_policy

MAX_KL = 0.01  # nats a token. What was measured lies 10 to 200 times below; with an adapter left out it is above 0.1
MAX_KL_NF4 = 0.1  # of a merged model that is quantized again: the loss of 4 bit, 1e-3 where it was measured
MAX_SCORE_ERROR = 0.1  # in units of the scores or of their spread, whichever is larger
POSITIONS = 512  # tokens that are compared; their full distributions are held in memory
PROMPTS = 16  # of the rows that are read
MAX_PROMPT = 1024  # tokens
QUESTIONS = (
    "What is the capital of France?",
    "Write three sentences about the sea.",
    "Explain why the sky is blue to a child.",
    "List five things to pack for a journey.",
    "Translate to German: good morning, how are you?",
    "What is 17 times 23? Show the steps.",
    "Write a short poem about a cat.",
    "How do I boil an egg?",
)


@dataclass(frozen=True)
class Agreement:
    """kl: KL(trained ‖ merged) in nats a token, exact over the vocabulary. top1: share of the tokens whose likeliest
    next token is the same. tokens: how many were compared."""

    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class ScoreAgreement:
    """Of a reward model. error: root mean square of the differences between merged and trained scores. spread: standard
    deviation of the trained ones."""

    error: float
    spread: float


@dataclass(frozen=True)
class TrainedModel:
    """What the trained model predicts: log-probs over the vocabulary for the examples' completions. bare: the same of the
    base without adapters. scores: of a reward model, one per example."""

    examples: list[Example]
    logps: list[torch.Tensor]
    bare: list[torch.Tensor]
    scores: torch.Tensor | None = None


def run_trained(
    sources: Sources,
    adapters: Sequence[str],
    prompts: Sequence[list[int]],
    dtype: torch.dtype,
    base: Base | None = None,
) -> TrainedModel:
    """Run base + adapters as they were trained on their own answers to the prompts (token ids).

    dtype: of an adapter that does not say in which it was trained. base: one that is loaded already; used if it is the base
    of the training. Another one is freed before this returns.
    """
    dtype = sources.trained_dtype or dtype
    if base is None or (base.identity.quantization, base.dtype) != (sources.quantization, dtype):
        base = Base.load(sources.base, quantization=sources.quantization, dtype=dtype, quiet=True)
    host = Host(base)
    stack = load_policy(host, adapters, allow_base_mismatch=True)  # checked before
    host.base.end_at(sources.chat.end_of_turn)
    try:
        return _run_trained(sources, host, stack, prompts)
    finally:
        for name in stack:
            host.delete(name)
        del host, base
        gc.collect()


def _run_trained(sources: Sources, host: Host, stack: Stack, prompts: Sequence[list[int]]) -> TrainedModel:
    if sources.scalar_head is not None:  # it scores the answers of what it was trained on top of
        examples = sampled_examples(host, stack[:-1], prompts)
        with host.use(*stack), torch.no_grad():
            scores = torch.cat(host.scores(examples, stack[-1])).float().cpu()
        return TrainedModel(examples, [], [], scores)
    examples = sampled_examples(host, stack, prompts)
    logps = trained_logps(host, stack, examples)
    bare = trained_logps(host, (), examples) if sources.onto == "original" else []
    return TrainedModel(examples[: len(logps)], logps, bare)


def check_predictions(
    folder: Path, sources: Sources, trained: TrainedModel, virtual: list[int], nf4: bool
) -> Agreement:
    """Compare and log. virtual: the ids before every text of the merged model. nf4: it was quantized again.

    Raises UserError when the model in the folder is not the trained one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    merged = merged_logps(folder, _behind(virtual, trained.examples), device)
    # The virtual tokens are never sampled: the distributions are those over the tokens of the base.
    columns = slice(virtual[0] if virtual else None)
    result = agreement(*([p[:, columns].log_softmax(-1) for p in logps] for logps in (trained.logps, merged)))
    quantized = "NF4 " if nf4 else ""
    log(
        f"{quantized}merged against trained on {result.tokens} tokens: KL {result.kl:.1e} nats, same top token {result.top1:.1%}"
    )
    limit, onto = (MAX_KL_NF4 if nf4 else MAX_KL), sources.onto
    if result.kl > limit and onto == "original":
        # The 4-bit base itself may be that far from the original weights, in a model that quantizes badly.
        limit = 2 * agreement(trained.bare, merged_logps(sources.base, trained.examples, device)).kl
    if not result.kl <= limit:
        remedy = "--onto dequantized" if onto == "original" else "without --quantize" if nf4 else "--dtype float32"
        raise UserError(
            f"the merged model is not the trained one: KL {result.kl:.2g} nats a token, at most {limit:.2g} is allowed; it "
            f"was not kept. Try {remedy}"
        )
    return result


def check_scores(folder: Path, trained: TrainedModel, virtual: list[int]) -> ScoreAgreement:
    """Compare and log. Raises UserError when the classifier in the folder gives other scores than the reward run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = score_agreement(trained.scores, merged_scores(folder, _behind(virtual, trained.examples), device))
    log(f"scores merged against trained: off by {result.error:.1e}, spread {result.spread:.2g}")
    limit = max(MAX_SCORE_ERROR, MAX_SCORE_ERROR * result.spread)
    if not result.error <= limit:
        raise UserError(
            f"the merged reward model does not give the trained one's scores: off by {result.error:.2g}, at most {limit:.2g} "
            "is allowed; it was not kept. Try --onto dequantized, --dtype float32, or without --quantize"
        )
    return result


def check_prompts(chat: Chat, files: Sequence[str]) -> list[list[int]]:
    """The ids of the prompts to compare on: of the first rows of `files`, else of built-in questions."""
    rows = list(islice(read_prompts(files), PROMPTS)) if files else []
    rows = rows or [PromptRow([{"role": "user", "content": question}], "") for question in QUESTIONS]
    return [ids for ids in (prompt_ids(chat, row) for row in rows) if len(ids) <= MAX_PROMPT] or [
        chat.prompt_ids([{"role": "user", "content": QUESTIONS[0]}])
    ]


def _behind(virtual: list[int], examples: Sequence[Example]) -> list[Example]:
    return [Example(virtual + e.prompt, e.completions) for e in examples]


def sampled_examples(host: Host, stack: Sequence[str], prompts: Sequence[list[int]]) -> list[Example]:
    """The prompts with the trained model's own answers, up to a token that the tokenizer does not have (an untrained base
    samples them; a baked prompt takes their rows)."""
    with host.use(*stack):
        answers = host.generate(prompts, 1, Sampling(max_new_tokens=48, min_new_tokens=8))
    words = max(host.base.tokenizer.get_vocab().values()) + 1
    ids = [list(takewhile(lambda i: i < words, row[0].ids)) for row in answers]
    return [Example(prompt, [answer]) for prompt, answer in zip(prompts, ids, strict=True) if answer]


@torch.no_grad()
def trained_logps(host: Host, stack: Sequence[str], examples: Sequence[Example]) -> list[Tensor]:
    """For each Example log p over the vocabulary, before each token of its completion: (tokens, vocabulary), fp32, on the
    CPU, under base + adapters. Stops after POSITIONS tokens."""
    rows: list[Tensor] = []
    with host.use(*stack):
        for example in examples:
            rows.append(_logps(host.base.model, example, host.base.device, host.soft_prompt()))
            if sum(map(len, rows)) >= POSITIONS:
                break
    return rows


@torch.no_grad()
def merged_logps(folder: Path, examples: Sequence[Example], device: torch.device) -> list[Tensor]:
    """The same of the model in a folder, loaded by plain transformers."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map={"": device}, use_safetensors=True, trust_remote_code=False
        )
    rows = [_logps(model, example, device) for example in examples]
    del model
    gc.collect()
    return rows


def agreement(trained: Sequence[Tensor], merged: Sequence[Tensor]) -> Agreement:
    """Compare the distributions token by token."""
    kl = same = tokens = 0.0
    for p, q in zip(trained, merged, strict=True):
        kl += (p.double().exp() * (p.double() - q.double())).sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        tokens += len(p)
    return Agreement(max(0.0, kl / tokens), same / tokens, int(tokens))


def score_agreement(trained: Tensor, merged: Tensor) -> ScoreAgreement:
    """Compare the scores of the same completions."""
    return ScoreAgreement((trained - merged).square().mean().sqrt().item(), trained.std().item())


@torch.no_grad()
def merged_scores(folder: Path, examples: Sequence[Example], device: torch.device) -> Tensor:
    """The score of each Example's first completion by the sequence classifier in a folder, loaded by plain transformers."""
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", device_map={"": device}, use_safetensors=True, trust_remote_code=False
        )
    rows = [torch.tensor([e.prompt + e.completions[0]], device=device) for e in examples]
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in rows])


def _logps(model: nn.Module, example: Example, device: torch.device, soft: SoftPrompt = NO_SOFT_PROMPT) -> Tensor:
    completion = example.completions[0]
    ids = torch.tensor(example.prompt + completion, device=device)
    words = soft.prepend(model.get_input_embeddings()(ids)) if soft.length else None
    inputs = {"input_ids": ids[None]} if words is None else {"inputs_embeds": words[None]}
    logits = model(**inputs, use_cache=False).logits[0, -len(completion) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()
