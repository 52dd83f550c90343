"""The options of the commands that make something for others: checkpoint, merge, push and pull.

A field is a flag and a YAML key. Its docstring is the help text and the comment in a complete recipe.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowalign.config.sections import OutDir
from lowalign.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """Write a checkpoint of a run, finished or not, as an adapter folder: what OUT/adapter would be at that step."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN[@STEP|@best]")]
    """Folder of the run. @STEP: a step that has a checkpoint. @best: the weights with the lowest eval/loss (ppo: highest eval/reward). Default: the
    newest checkpoint."""
    out: OutDir
    """Folder of the adapter. It must not exist."""
    model: str | None = None
    """The base, to which the adapter belongs. Default: as in the run."""
    device: str | None = None
    """Where the base is loaded: cpu, cuda. Default: as in the run."""


@dataclass(frozen=True)
class MergeConfig:
    """Merge adapters into their base: plain weights that transformers, vLLM and llama.cpp load. The result is compared
    with the trained model before it is kept."""

    adapters: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_OR_ADAPTER…")]
    """Runs, adapter folders or Hub ids, in the order they stack. A run brings the adapters it was trained on top of."""
    out: OutDir
    """Folder of the merged model. It must not exist."""
    model: str | None = None
    """Base model, a folder or a Hub id. Default: the one the run names."""
    onto: Literal["dequantized", "original"] | None = None
    """dequantized: the NF4 weights the adapters were trained on, converted back to 16 bit; closest to the trained model.
    original: the base's own 16-bit weights. Default: dequantized for adapters trained on a 4-bit base, else original."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of the merged weights."""
    max_shard_size: str = "5GB"
    """Largest file of weights."""
    quantize: Literal["nf4"] | None = None
    """nf4: write a bitsandbytes 4-bit checkpoint, a quarter of the size. Quantizing again costs some accuracy; the KL says
    how much."""
    prompt_in: Literal["template", "tokenizer"] | None = None
    """Of a soft prompt, which becomes tokens before every text: what writes them. template: the chat template. tokenizer:
    the tokenizer; the merged model then has no chat template. Default: tokenizer for an adapter that was trained on plain
    text, else template."""
    data: tuple[str, ...] = ()
    """Files with prompts to compare on. Default: the held-out files of the run's recipe, else built-in questions."""
    verify: bool = True
    """Compare with the trained model (KL and top-1 agreement) and keep nothing if it differs. --no-verify skips it."""
    allow_base_mismatch: bool = False
    """Accept adapters that were trained on another base."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise UserError("no adapter to merge: lowalign merge RUN_OR_ADAPTER… --out DIR")


@dataclass(frozen=True)
class PushConfig:
    """Publish a run's adapter, an adapter or a merged model on the Hugging Face Hub: known files only, in one commit, with
    a model card. The files are listed back and compared. The token is that of HF_TOKEN or `hf auth login`."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Run, adapter folder or model folder."""
    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO")]
    """Repository: NAMESPACE/NAME, or NAME in your own namespace. It is made if it does not exist."""
    private: bool = False
    """Make the repository private."""
    revision: str | None = None
    """Branch. It is made if it does not exist. Default: main."""


@dataclass(frozen=True)
class PullConfig:
    """Download an adapter or a model from the Hugging Face Hub to a new folder: safetensors only, at one commit, compared
    with the Hub's hashes. A pull that was interrupted goes on from the cache."""

    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO")]
    """Repository: NAMESPACE/NAME."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder to write. It must not exist."""
    revision: str | None = None
    """Branch, tag or commit. Default: main."""
