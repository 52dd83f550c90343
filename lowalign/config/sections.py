"""The options that several commands share, by section.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.errors import UserError

Model = Annotated[str, tyro.conf.arg(metavar="M")]
OutDir = Annotated[Path, tyro.conf.arg(metavar="DIR")]
ShapeName = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text"]
PromptFormat = Literal["text", "chat"]
PreferenceShapeName = Literal["auto", "pairs", "ranking", "scores", "labels", "verdicts"]


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base model."""

    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4-bit NormalFloat with double quantization (QLoRA). none: the weights as stored."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the computation, and of embeddings, norms and LM head. GPUs before Ampere (RTX 30) have no bfloat16."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. The commit in use is recorded with the adapter."""


@dataclass(frozen=True)
class DataConfig:
    """The training rows."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False, metavar="FILE")] = ()
    """JSON or JSONL files, or Hub dataset ids (NAME or NAME:SPLIT). The flag is --data FILE …"""
    eval: tuple[str, ...] = ()
    """Held-out files, for evaluation. With these or eval_rows, the adapter is the best one: see train.result."""
    eval_rows: float = 0
    """Number of rows to hold out, if `eval` names no files. Below 1: that share of the rows, at most 200 of them. They are
    chosen at random, by train.seed."""
    shape: ShapeName = "auto"
    """Row format. auto: recognised from the columns."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out of the rows. Rows with columns that change their meaning and are not used are refused."""
    rename: tuple[str, ...] = ()
    """OLD=NEW …: columns to read under another name, for example functions=tools system_prompt=system."""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text (default): plain text, without the chat template. chat: turns of user and
    assistant. Where it is not given, an --init that was trained on the other format is refused."""
    max_length: int = 2048
    """Maximum tokens of one example; see `long`. ppo: maximum tokens of a prompt; longer prompts are left out."""
    long: Literal["turns", "left", "drop"] = "turns"
    """Examples that are too long. turns: a conversation loses the turns at its end that do not fit; where not even the first
    answer fits, as left. left: the prompt is cut from the left, the completion is kept. drop: the row is left out.
    Preferences are cut from the left, or dropped."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """Bad rows: refuse to start, or skip them and list them in OUT/rejected.jsonl."""
    template: Path | None = None
    """Jinja file with a chat template, used instead of the tokenizer's own."""
    template_args: tuple[str, ...] = ()
    """NAME=VALUE …: variables of the chat template, for example enable_thinking=false. They become part of the template
    that is saved with the adapter."""
    thoughts: Literal["last", "all", "none"] = "last"
    """Thoughts of the assistant (reasoning_content, <think> in the text). last: as the chat template writes them; where it
    takes them out of earlier turns, each turn becomes one example. all: one example, with the thoughts of all turns. none:
    left out."""
    lossy: Literal["drop", "keep"] = "drop"
    """Rows whose supervised text, call or thoughts the chat template leaves out: drop them, or learn the rest."""
    limit: int | None = None
    """Use only the first N rows of each file, for a trial."""
    cache: bool = True
    """Keep tokenized rows on disk, and reuse them if rows, tokenizer and template are unchanged."""


@dataclass(frozen=True)
class PreferenceConfig(DataConfig):
    """The preferences."""

    shape: PreferenceShapeName = "auto"
    """Row format. auto: recognised from the columns."""
    gap: float = 0.0
    """Rows with scores: scores within `gap` of a rank's best share its rank."""
    verdicts: Literal["majority", "weight"] = "majority"
    """Pairs with several annotators. majority: the answer with more votes is chosen, weight 1. weight: the same choice,
    weighted by (difference of votes) / (all votes)."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs without a winner: drop them, or keep them. A reward model can learn from ties."""

    def __post_init__(self) -> None:
        if not 0 <= self.gap < float("inf"):
            raise UserError(f"--data.gap is {self.gap}; it must be 0 or more")


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter that is trained."""

    kind: Literal["lora", "prompt", "prefix"] = "lora"
    """lora: low-rank updates of linear layers. prompt: trained embeddings before each prompt. prefix: trained keys and
    values before each prompt, in every layer."""
    r: int = 16
    """lora: rank, usually 8 to 64. A higher rank has more capacity and takes more memory."""
    alpha: int = 32
    """lora: the update is scaled by alpha/r (by alpha/sqrt(r) with rslora)."""
    dropout: float = 0.0
    """lora: dropout on the adapter's input during training; 0.05 helps on a few hundred rows. dpo and ppo need 0."""
    targets: tuple[str, ...] = ("all-linear",)
    """lora: names of the layers to adapt. all-linear: every linear layer except the LM head."""
    rslora: bool = False
    """lora: rank-stabilised scaling (arXiv 2312.03732), for ranks of 64 and more."""
    dora: bool = False
    """lora: weight-decomposed adaptation (arXiv 2402.09353). Slower; sometimes better at a low rank."""
    virtual_tokens: int = 20
    """prompt, prefix: number of virtual tokens. Each makes every prompt one token longer."""
    init_text: str | None = None
    """prompt, prefix: start from the embeddings (or keys and values) of this text, repeated or cut to fit, instead of at
    random. Not with projection."""
    projection: bool = False
    """prefix: train it through an MLP that is dropped at the end (arXiv 2101.00190). Steadier; many more weights to train."""
    projection_size: int | None = None
    """prefix: hidden size of that MLP. Default: the width of one layer's keys."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int | None = None
    """Number of optimizer steps. Default: from epochs."""
    epochs: float = 1.0
    """Passes over the data, if steps is not set: 1 for many thousand rows, 3 for a few hundred."""
    batch_size: int = 16
    """Examples (for ppo: prompts) per optimizer step. Does not affect memory: see token_budget."""
    token_budget: int = 4096
    """Maximum tokens of a micro-batch: memory and speed. Halved automatically when memory runs out. Does not change gradients."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup: float = 0.03
    """Fraction of the steps over which the learning rate rises to its peak."""
    clip: float = 1.0
    """Maximum gradient norm of each trained adapter; larger gradients are scaled down to it. 0: no clipping."""
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = "paged_adamw_8bit"
    """AdamW with 8-bit state in pageable memory, with 8-bit state, or with 32-bit state."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's beta1 and beta2."""
    eps: float = 1e-8
    """AdamW's epsilon. The PPO runs of OpenAI used 1e-5 (arXiv 2403.17031)."""
    seed: int = 0
    """Seed of data order, initial weights and dropout."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on the held-out rows. 0: only before the first step and after the last."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints kept, besides the best one."""
    result: Literal["best", "last"] | None = None
    """What OUT/adapter holds. best: the weights with the lowest eval/loss (ppo: highest eval/reward). last: those after the last step. Default: best
    with held-out rows, last without."""
    checkpointing: Literal["on", "off", "offload"] = "on"
    """Activation checkpointing. on: recompute activations in the backward pass. off: keep them (faster, more memory).
    offload: recompute, with layer inputs kept in CPU memory (least GPU memory)."""
    track: Literal["none", "tensorboard"] = "none"
    """Also write metrics for tensorboard (pip install lowalign[track]). metrics.jsonl is always written."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int = 256
    """Maximum tokens of one completion."""
    min_new_tokens: int = 0
    """Minimum tokens of one completion."""
    temperature: float = 1.0
    """Logits are divided by it. 0: always the most likely token (greedy)."""
    top_k: int = 0
    """Sample from the k most likely tokens. 0: from all."""
    top_p: float = 1.0
    """Nucleus sampling: from the most likely tokens with this total probability (arXiv 1904.09751). 1: from all."""
    seed: int = 0
    """Random seed. A completion depends on the seed, its prompt and its index, not on what else is in the batch."""
    max_rows: int = 64
    """Maximum completions sampled at a time: memory and speed. Does not change the completions, except on a GPU, where its kernels
    round differently for other numbers of rows."""
    batch_tokens: int = 16384
    """Maximum tokens in the KV cache: each prompt once, plus max_new_tokens for each completion."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "max_rows": (self.max_rows >= 1, "at least 1"),
        }
        for name, (valid, range_) in checks.items():
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")
