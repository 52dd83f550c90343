"""The section `data` of the verbs that do not train. Its options have the names that they have in those that do."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lowalign.config.ranges import PositiveInt
from lowalign.config.sections import PromptFormat

Files = Annotated[tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False, metavar="FILE")]


@dataclass(frozen=True)
class AnswersConfig:
    """The answers."""

    files: Files = ()
    """Rows with prompt and completions; or prompt, completion_a and completion_b; or prompt and completion, one answer
    per row. The flag is --data FILE …"""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text (default): plain text, without the chat template. chat: turns of user and
    assistant."""


@dataclass(frozen=True)
class PromptsConfig:
    """The prompts."""

    files: Files = ()
    """JSON or JSONL files, or Hub dataset ids, of rows with a prompt or messages. Answers in the rows are ignored. The flag is
    --data FILE …"""
    limit: PositiveInt | None = None
    """Use only the first N prompts, for a trial."""
    prompt_format: PromptFormat | None = None
    """Prompts that are strings. text: plain text, without the chat template. chat: a turn of the user. Default: what the
    adapters were trained on; text where that is not known. best-of-n: text, and where it is not given, an --adapter that was
    trained on the other format is refused."""


@dataclass(frozen=True)
class ShortPromptsConfig(PromptsConfig):
    """The prompts."""

    max_length: PositiveInt = 1024
    """Maximum tokens of a prompt. Longer prompts are left out."""


@dataclass(frozen=True)
class JudgedRowsConfig(ShortPromptsConfig):
    """The prompts, with several answers each or to be answered by policies."""

    files: Files = ()
    """Rows with a prompt and several answers (completions; completion_a and completion_b; or completion, one answer per row).
    For answers of policies: rows with a prompt or messages, whose answers are ignored. The flag is --data FILE …"""


@dataclass(frozen=True)
class SeedsConfig:
    """The seed rows."""

    files: Files = ()
    """Rows of sft, or with a prompt alone: ten to a few hundred. The flag is --data FILE …"""


@dataclass(frozen=True)
class FilePromptsConfig(PromptsConfig):
    """A file of prompts."""

    on_error: Literal["skip", "stop"] = "skip"
    """Prompts that leave no room for a completion in the base's positions. skip: leave them out, name and count them. stop:
    generate nothing."""


@dataclass(frozen=True)
class MeasuredRowsConfig:
    """The rows, of sft or of preferences."""

    files: Files = ()
    """JSON or JSONL files, or Hub dataset ids. The flag is --data FILE …"""
    prompt_format: PromptFormat | None = None
    """Prompts and answers that are strings. text: plain text, without the chat template. chat: turns of user and assistant.
    Default: score: text; eval: what the adapters were trained on, text where that is not known."""
    max_length: PositiveInt = 2048
    """Maximum tokens of a prompt with its completion. Longer prompts are cut from the left."""
    limit: PositiveInt | None = None
    """Use only the first N rows of each file, or N questions of each task, for a trial."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """Bad rows: refuse to start, or skip them."""
