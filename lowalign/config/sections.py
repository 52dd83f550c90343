"""The options that commands share, by section (what each command takes as a whole is in lowalign.commands).

A field is a flag, a YAML key and a line of the docs; its docstring is the help text. Nothing here imports torch, so `lowalign --help` answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.errors import UserError

ShapeName = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text"]
PreferenceShapeName = Literal["auto", "pairs", "ranking", "scores", "labels", "verdicts"]


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base model."""

    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4-bit NormalFloat with double quantization (QLoRA). none: as stored."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute precision, and the precision of embeddings, norms and head."""
    device: str = "auto"
    """auto: the GPU where there is one, else the CPU."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. The resolved commit is written into the run."""


@dataclass(frozen=True)
class DataConfig:
    """The rows to train on."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False, metavar="FILE")] = ()
    """JSON or JSONL files, or Hub dataset ids (optionally NAME:SPLIT). Written as --data FILE …"""
    eval: tuple[str, ...] = ()
    """Held-out files. Without them --data.eval-rows are taken from the end of a seeded shuffle of the data."""
    eval_rows: int = 0
    """Rows held out from the data for evaluation, when no held-out files are given."""
    shape: ShapeName = "auto"
    """The shape of the rows; auto tells it from their columns."""
    max_length: int = 2048
    """Most tokens of one example. Too long: the completion is kept and the prompt is cut from the left."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """What to do with bad rows: refuse to start, or skip them and write them to OUT/rejected.jsonl."""
    template: Path | None = None
    """A chat template (Jinja file) to use instead of the tokenizer's own."""
    limit: int | None = None
    """Use only the first N rows of each file."""
    cache: bool = True
    """Keep the tokenized rows on disk and use them again when neither rows, tokenizer nor template changed."""


@dataclass(frozen=True)
class PreferenceConfig(DataConfig):
    """The preferences to learn from."""

    shape: PreferenceShapeName = "auto"
    """The shape of the rows; auto tells it from their columns."""
    gap: float = 0.0
    """scores: from the highest down, a score ties with the highest of its rank unless that is higher by more than this."""
    verdicts: Literal["majority", "weight"] = "majority"
    """Annotators of a pair. majority: what most chose, counting 1. weight: who leads, counting its lead / all votes."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs without a winner: leave them out, or keep them (the reward model can learn from them)."""

    def __post_init__(self) -> None:
        if not 0 <= self.gap < float("inf"):
            raise UserError(f"gap is {self.gap}; it must be 0 or more")


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained."""

    kind: Literal["lora", "prompt", "prefix"] = "lora"
    """lora: low-rank updates. prompt: learned embeddings before the prompt. prefix: learned keys and values per layer."""
    r: int = 16
    """lora: rank."""
    alpha: int = 32
    """lora: the update is scaled by alpha/r (alpha/sqrt(r) with rslora)."""
    dropout: float = 0.0
    """lora: dropout on the adapter's input, while training."""
    targets: tuple[str, ...] = ("all-linear",)
    """lora: names of the layers it is put on; all-linear is every linear layer but the head."""
    rslora: bool = False
    """lora: rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """lora: weight-decomposed adaptation (arXiv 2402.09353)."""
    virtual_tokens: int = 20
    """prompt, prefix: number of virtual tokens."""
    init_text: str | None = None
    """prompt, prefix: start from this text (its embeddings, or its keys and values) instead of at random."""
    projection: bool = False
    """prefix: reparametrise through an MLP while training (arXiv 2101.00190)."""
    projection_size: int | None = None
    """prefix: hidden size of that MLP; the width of one layer's keys when left out."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None
    """Optimizer steps. Left out: --train.epochs times the data."""
    epochs: float = 1.0
    """Passes over the data, when steps is left out."""
    batch_size: int = 16
    """Examples of one optimizer step, whatever fits on the card at a time."""
    token_budget: int = 4096
    """Most tokens on the card at a time (a micro-batch). Halved by itself when memory runs out; never changes gradients."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    clip: float = 1.0
    """Gradients longer than this are scaled down to it; 0 turns clipping off."""
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = "paged_adamw_8bit"
    """AdamW with its state in 8 bit and in pageable memory, in 8 bit, or in 32 bit."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    seed: int = 0
    """Decides data order, initial weights and dropout."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on the held-out rows; 0: before the first step and after the last."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept besides the best."""
    checkpointing: Literal["on", "off", "offload"] = "on"
    """Recompute activations in the backward pass (on), keep them (off), or keep the layer inputs in CPU memory (offload)."""
    track: Literal["none", "tensorboard"] = "none"
    """Also send the metrics to a tracker (pip install lowalign[track])."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int = 256
    """Most tokens of one completion."""
    min_new_tokens: int = 0
    """No completion ends before it has this many tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this probability (arXiv 1904.09751); 1: from all."""
    seed: int = 0
    """Decides the draws. A completion depends on it, its prompt and its number, never on what else is sampled beside it."""
    max_rows: int = 64
    """Most completions worked on at a time; more is faster and takes more memory. Never changes what is drawn."""
    batch_tokens: int = 16384
    """Most tokens whose keys and values are kept at a time: prompts once, completions at their longest."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "max_rows": (self.max_rows >= 1, "at least 1"),
        }
        for name, (fine, range_) in checks.items():
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")
