"""Whether a merged model is the one that was trained: both run on the same tokens, their distributions compared."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.base.base import Base, quiet_transformers
from lowalign.model.host import Host
from lowalign.model.policy import load_policy

MAX_KL = 0.01  # nats a token. What was measured lies 10 to 200 times below; with an adapter left out it is above 0.1
MAX_SCORE_ERROR = 0.1  # in units of the scores or of their spread, whichever is larger
POSITIONS = 256  # tokens that are compared; their full distributions are held in memory
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
    base: str, adapters: Sequence[str], chat: Chat, quantization: str, dtype: str, reward: bool, bare: bool
) -> TrainedModel:
    """Run base + adapters as they were trained, in the precision of the merged model. The base is freed before this
    returns. reward: for a reward model. bare: the base without adapters too."""
    host = Host(Base.load(base, quantization=quantization, dtype=dtype, quiet=True))
    stack = load_policy(host, adapters, allow_base_mismatch=True)  # checked before
    host.base.end_at(chat.end_of_turn)
    if reward:  # it scores the answers of what it was trained on top of
        examples = sampled_examples(host, stack[:-1], chat)
        with host.use(*stack), torch.no_grad():
            scores = torch.cat(host.scores(examples, stack[-1])).float().cpu()
        return TrainedModel(examples, [], [], scores)
    examples = sampled_examples(host, stack, chat)
    logps = trained_logps(host, stack, examples)
    bare_logps = trained_logps(host, (), examples) if bare else []
    del host
    gc.collect()
    return TrainedModel(examples[: len(logps)], logps, bare_logps)


def check_predictions(folder: Path, base: Path, trained: TrainedModel, onto: str) -> Agreement:
    """Compare and log. Raises UserError when the model in the folder is not the trained one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = agreement(trained.logps, merged_logps(folder, trained.examples, device))
    log(f"merged against trained on {result.tokens} tokens: KL {result.kl:.1e} nats, same top token {result.top1:.1%}")
    limit = MAX_KL
    if result.kl > limit and onto == "original":
        # The 4-bit base itself may be that far from the original weights, in a model that quantizes badly.
        limit = 2 * agreement(trained.bare, merged_logps(base, trained.examples, device)).kl
    if not result.kl <= limit:
        raise UserError(
            f"the merged model is not the trained one: KL {result.kl:.2g} nats a token, at most {limit:.2g} is allowed; it "
            f"was not kept. Try {'--onto dequantized' if onto == 'original' else '--dtype float32'}"
        )
    return result


def check_scores(folder: Path, trained: TrainedModel) -> ScoreAgreement:
    """Compare and log. Raises UserError when the classifier in the folder gives other scores than the reward run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = score_agreement(trained.scores, merged_scores(folder, trained.examples, device))
    log(f"scores merged against trained: off by {result.error:.1e}, spread {result.spread:.2g}")
    limit = max(MAX_SCORE_ERROR, MAX_SCORE_ERROR * result.spread)
    if not result.error <= limit:
        raise UserError(
            f"the merged reward model does not give the trained one's scores: off by {result.error:.2g}, at most {limit:.2g} "
            "is allowed; it was not kept. Try --onto dequantized or --dtype float32"
        )
    return result


def sampled_examples(host: Host, stack: Sequence[str], chat: Chat) -> list[Example]:
    """Questions with the trained model's own answers."""
    prompts = [chat.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    with host.use(*stack):
        answers = host.generate(prompts, 1, Sampling(max_new_tokens=48, min_new_tokens=8))
    return [Example(prompt, [row[0].ids]) for prompt, row in zip(prompts, answers, strict=True)]


@torch.no_grad()
def trained_logps(host: Host, stack: Sequence[str], examples: Sequence[Example]) -> list[Tensor]:
    """For each Example log p over the vocabulary, before each token of its completion: (tokens, vocabulary), fp32, on the
    CPU, under base + adapters. Stops after POSITIONS tokens."""
    rows: list[Tensor] = []
    with host.use(*stack):
        for example in examples:
            rows.append(_logps(host.base.model, example, host.base.device))
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
    p, q = torch.cat(list(trained)).double(), torch.cat(list(merged)).double()
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Agreement(max(0.0, kl), (p.argmax(-1) == q.argmax(-1)).double().mean().item(), len(p))


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


def _logps(model: torch.nn.Module, example: Example, device: torch.device) -> Tensor:
    completion = example.completions[0]
    ids = torch.tensor([example.prompt + completion], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()
