"""The options that several commands share, by section.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.loss_bounds import read_bound
from lowalign.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check_numbers,
)
from lowalign.errors import UserError

Model = Annotated[str, tyro.conf.arg(metavar="M")]
OutDir = Annotated[Path, tyro.conf.arg(metavar="DIR")]
ShapeName = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text"]
PromptFormat = Literal["text", "chat"]
BelowOne = Annotated[float, Range(0, 1, below=True)]
LearningRate = Annotated[float, Range(0, 10, above=True)]
PreferenceShapeName = Literal["auto", "pairs", "ranking", "scores", "labels", "verdicts"]


@dataclass(frozen=True)
class RevisionConfig:
    """The base model."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""


@dataclass(frozen=True)
class BaseConfig:
    """The frozen base model."""

    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4-bit NormalFloat with double quantization (QLoRA). none: the weights as stored."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the computation, and of embeddings, norms and LM head. GPUs before Ampere (RTX 30) have no bfloat16."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU."""
    embedding: Literal["device", "cpu"] = "device"
    """Where the embedding is. cpu: in CPU memory, 1.5 GB less of the GPU for a 32B model. Not for models whose LM head has
    the same weights."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. The commit in use is recorded with the adapter."""
    exact: bool = False
    """Compute LoRA layers by peft's code, and norms, rotary embeddings and MLPs by transformers' own: slower, more memory. In
    fp32 the results are the same to 1e-6; in 16 bit they differ by rounding."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile norms, rotary embeddings and MLPs to one kernel each. auto: on a GPU. on: on the CPU too, which takes a minute the
    first time and needs a C++ compiler; faster from some hundred steps on. Where it is not possible they run as they are."""
    leave_free: NonNegativeFloat = 0.7
    """GiB of the GPU's memory that are never used, for fragmentation and other programs. Without it the drivers of Windows and
    WSL2 move memory to the system's, and everything becomes slow."""


@dataclass(frozen=True)
class DataConfig:
    """The training rows."""

    files: Annotated[tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False, metavar="FILE")] = ()
    """Files (JSON, JSONL, CSV, TSV, Parquet, Arrow; .gz, .zst, .xz, .bz2), folders, globs, - for standard input, folders of
    save_to_disk, or Hub datasets NAME[:SUBSET][:SPLIT[0:1000]][@REVISION]. The flag is --data FILE …"""
    eval: tuple[str, ...] = ()
    """Held-out files, for evaluation. With these or eval_rows, the adapter is the best one: see train.result."""
    eval_rows: NonNegativeFloat = 0
    """Number of rows to hold out, if `eval` names no files. Below 1: that share of the rows, at most 200 of them. They are
    chosen at random, by train.seed."""
    shape: ShapeName = "auto"
    """Row format. auto: recognised from the columns."""
    weights: tuple[NonNegativeFloat, ...] = ()
    """Mixture: the share of each source in --data, in their order, for example 3 1. An epoch has as many examples as all
    sources together."""
    cap: PositiveInt | None = None
    """Mixture: shares by the sizes of the sources, each counted up to this number of rows (arXiv 1910.10683)."""
    source_epochs: tuple[NonNegativeFloat, ...] = ()
    """Mixture: passes over each source in an epoch, for example 1 4."""
    preset: tuple[str, ...] = ()
    """What the columns mean: the name of a preset or template (`lowalign data presets`), or a YAML file. One for all sources, or
    one for each (none: as they are)."""
    columns: tuple[str, ...] = ()
    """NEW=OLD …: the columns of a row format by their names in the data, for example prompt=question completion=answer. Other
    columns are left out."""
    prompt: str | None = None
    """Jinja of the columns, for example "{{question}}": the prompt. With completion, or chosen and rejected."""
    completion: str | None = None
    """Jinja of the columns, for example "{{answer}}": the completion."""
    system: str | None = None
    """Jinja of the columns: the system text. With data.prompt-format chat."""
    ignore: tuple[str, ...] = ()
    """Columns to leave out of the rows. Rows with columns that change their meaning and are not used are refused."""
    rename: tuple[str, ...] = ()
    """OLD=NEW …: columns to read under another name, for example functions=tools system_prompt=system."""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text (default): plain text, without the chat template. chat: turns of user and
    assistant. Where it is not given, an --init that was trained on the other format is refused."""
    max_length: PositiveInt = 2048
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
    turns: Literal["all", "last"] = "all"
    """Turns of the assistant to learn from: all (without those of weight 0), or the last one of each conversation."""
    lossy: Literal["drop", "keep"] = "drop"
    """Rows whose supervised text, call or thoughts the chat template leaves out: drop them, or learn the rest."""
    limit: PositiveInt | None = None
    """Use only the first N rows of each file, for a trial."""
    losses: Path | None = None
    """The loss of each row, as `lowalign eval --per-row` writes them, for max_loss and min_loss."""
    max_loss: str | None = None
    """Leave out rows with a higher loss, which may teach what the base cannot know. In nats per supervised token (2.5), or as a
    quantile of the rows (95%). The loss is that of the first policy in `losses`."""
    min_loss: str | None = None
    """Leave out rows with a lower loss, which the base knows already: as max_loss."""
    cache: bool = True
    """Keep tokenized rows on disk, and reuse them if rows, tokenizer and template are unchanged."""
    processes: NonNegativeInt = 0
    """Processes that tokenize a file of 32 MiB or more. 0: as many as this process may use cores."""

    def __post_init__(self) -> None:
        for flag, bound in (("--data.max-loss", self.max_loss), ("--data.min-loss", self.min_loss)):
            if bound is not None:
                read_bound(bound, flag)
        if (self.losses is None) != (self.max_loss is None and self.min_loss is None):
            raise UserError("--data.losses FILE goes with --data.max-loss or --data.min-loss")


@dataclass(frozen=True)
class PreferenceConfig(DataConfig):
    """The preferences."""

    shape: PreferenceShapeName = "auto"
    """Row format. auto: recognised from the columns."""
    chosen: str | None = None
    """Jinja of the columns: the better answer."""
    rejected: str | None = None
    """Jinja of the columns: the worse answer."""
    gap: NonNegativeFloat = 0.0
    """Rows with scores: scores within `gap` of a rank's best share its rank."""
    verdicts: Literal["majority", "weight"] = "majority"
    """Pairs with several annotators. majority: the answer with more votes is chosen, weight 1. weight: the same choice,
    weighted by (difference of votes) / (all votes)."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs without a winner: drop them, or keep them. A reward model can learn from ties."""


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter that is trained."""

    kind: Literal["lora", "prompt", "prefix"] = "lora"
    """lora: low-rank updates of linear layers. prompt: trained embeddings before each prompt. prefix: trained keys and
    values before each prompt, in every layer."""
    r: PositiveInt = 16
    """lora: rank, usually 8 to 64. A higher rank has more capacity and takes more memory."""
    alpha: PositiveInt = 32
    """lora: the update is scaled by alpha/r (by alpha/sqrt(r) with rslora)."""
    dropout: BelowOne = 0.0
    """lora: dropout on the adapter's input during training; 0.05 helps on a few hundred rows. dpo and ppo need 0."""
    targets: tuple[str, ...] = ("all-linear",)
    """lora: names of the layers to adapt. all-linear: every linear layer except the LM head."""
    rslora: bool = False
    """lora: rank-stabilised scaling (arXiv 2312.03732), for ranks of 64 and more."""
    dora: bool = False
    """lora: weight-decomposed adaptation (arXiv 2402.09353). Slower; sometimes better at a low rank."""
    virtual_tokens: PositiveInt = 20
    """prompt, prefix: number of virtual tokens. Each makes every prompt one token longer."""
    init_text: str | None = None
    """prompt, prefix: start from the embeddings (or keys and values) of this text, repeated or cut to fit, instead of at
    random. Not with projection."""
    projection: bool = False
    """prefix: train it through an MLP that is dropped at the end (arXiv 2101.00190). Steadier; many more weights to train."""
    projection_size: PositiveInt | None = None
    """prefix: hidden size of that MLP. Default: the width of one layer's keys."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: PositiveInt | None = None
    """Number of optimizer steps. Default: from epochs."""
    epochs: PositiveFloat = 1.0
    """Passes over the data, if steps is not set: 1 for many thousand rows, 3 for a few hundred."""
    batch_size: PositiveInt = 16
    """Examples (for ppo: prompts) per optimizer step. Does not affect memory: see token_budget."""
    token_budget: PositiveInt = 4096
    """Maximum tokens of a micro-batch: memory and speed. Halved automatically when memory runs out. Does not change gradients."""
    learning_rate: LearningRate = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup: Annotated[float, Range(0, 1)] = 0.03
    """Fraction of the steps over which the learning rate rises to its peak."""
    clip: NonNegativeFloat = 1.0
    """Maximum gradient norm of each trained adapter; larger gradients are scaled down to it. 0: no clipping."""
    optimizer: Literal["auto", "paged_adamw_8bit", "adamw_8bit", "adamw"] = "auto"
    """AdamW with 8-bit state in pageable memory, with 8-bit state, or with 32-bit state. auto: 8-bit, pageable from 256 MiB on;
    less is not worth it. The results of all three 8-bit choices are the same."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's beta1 and beta2."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon. The PPO runs of OpenAI used 1e-5 (arXiv 2403.17031)."""
    seed: Seed = 0
    """Seed of data order, initial weights and dropout."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on the held-out rows. 0: only before the first step and after the last."""
    save_every: NonNegativeInt = 100
    """Steps between checkpoints. 0: only after the last step."""
    keep: PositiveInt = 2
    """Number of checkpoints kept, besides the best one."""
    result: Literal["best", "last"] | None = None
    """What OUT/adapter holds. best: the weights with the lowest eval/loss (ppo: highest eval/reward). last: those after the last step. Default: best
    with held-out rows, last without."""
    checkpointing: Literal["on", "off", "offload"] = "on"
    """Activation checkpointing. on: recompute activations in the backward pass. off: keep them (faster, more memory).
    offload: recompute, with layer inputs kept in CPU memory (least GPU memory)."""
    checkpoint_every: PositiveInt = 1
    """Layers between two layer inputs that are kept. 2: half of the memory for them (with offload: of CPU memory), and every
    second layer is computed once more."""
    keep_layers: NonNegativeInt = 0
    """Number of layers, from the last, that keep their activations: faster, more memory."""
    tile: NonNegativeInt = 4096
    """Rows of more tokens are computed in tiles of this many, all but the attention: memory for long context. 0: never.
    Does not change gradients."""
    track: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio", "mlflow"], tyro.conf.arg(name="track", prefix_name=False)
    ] = "none"
    """Also send metrics to a tracker (pip install lowalign[wandb], and so on). metrics.jsonl is always written."""
    run_name: Annotated[str | None, tyro.conf.arg(name="run-name", prefix_name=False)] = None
    """Name of the run in the tracker. Default: the name of OUT. tensorboard names runs by their folders."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    max_new_tokens: PositiveInt = 256
    """Maximum tokens of one completion."""
    min_new_tokens: NonNegativeInt = 0
    """Minimum tokens of one completion."""
    temperature: NonNegativeFloat = 1.0
    """Logits are divided by it. 0: always the most likely token (greedy)."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens. 0: from all."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling: from the most likely tokens with this total probability (arXiv 1904.09751). 1: from all."""
    seed: Seed = 0
    """Random seed. A completion depends on the seed, its prompt and its index, not on what else is in the batch."""
    max_rows: PositiveInt = 64
    """Maximum completions sampled at a time: memory and speed. Does not change the completions, except on a GPU, where its kernels
    round differently for other numbers of rows."""
    batch_tokens: PositiveInt = 16384
    """Maximum tokens in the KV cache: each prompt once, plus max_new_tokens for each completion."""
    dequantize: Literal["auto", "on", "off"] = "auto"
    """Keep the 4-bit weights in 16 bit (2 bytes a weight) while sampling: on the CPU 1.4 times as fast, with the same results.
    auto: on the CPU, if that takes at most half of the free memory. off: dequantize them for each token."""
    backend: Literal["lowalign", "vllm"] = "lowalign"
    """Who samples. vllm: vLLM, which loads the base a second time (pip install lowalign[vllm]); LoRAs only. It was tested against
    a stub of vLLM, not run."""
    vllm_memory: Annotated[float, Range(0, 1, above=True)] = 0.45
    """vllm: share of the card that it takes while it samples."""

    def __post_init__(self) -> None:
        check_numbers(self, "sampling.")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"--sampling.min-new-tokens is {self.min_new_tokens}; it must be at most --sampling.max-new-tokens, "
                f"{self.max_new_tokens}"
            )
