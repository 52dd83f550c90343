"""`lowalign data check`: what is recognised in files of rows, what is lost, and what of a row is learnt."""

import os
import re
import sys
from dataclasses import replace
from typing import get_args

from transformers import PreTrainedTokenizerBase

from lowalign.config.commands import AnyDataConfig, DataCheckConfig
from lowalign.config.sections import PreferenceShapeName
from lowalign.data.chat import load_chat
from lowalign.data.dataset import SFT_ENCODER, RowEncoder, list_bad, read_examples
from lowalign.data.pack import Example
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.data.report import report_lines
from lowalign.data.rows.read import Row, read_rows
from lowalign.model.base.hub import load_tokenizer

HEAD, TAIL = 800, 300  # characters shown of a long stretch
PEEKED = 100  # rows of each file that decide whether they are preferences


def data_check(config: DataCheckConfig) -> int:
    """Run the command. Returns the exit code: 1 when there are bad rows."""
    data = replace(config.data, files=(*config.files, *config.data.files))
    return 1 if check(data, config.model, config.revision, config.rows) else 0


def check(config: AnyDataConfig, model: str, revision: str | None = None, rows: int = 3) -> int:
    """Print what was recognised in config.files, lengths, drops and duplicates, and the first `rows` Examples with their
    supervised tokens marked. Returns the number of bad rows.

    Only the tokenizer of `model` (a folder or a Hub id) is loaded. Raises UserError when it or a file cannot be read.
    """
    tokenizer = load_tokenizer(model, revision)
    chat = load_chat(tokenizer, config.template)
    encoder = _reading(config)
    config = replace(config, on_error="skip")
    dataset = read_examples(config.files, chat, config, tokenizer=tokenizer, encoder=encoder)
    print("\n".join(report_lines(dataset.report)))
    repeated = len(dataset.examples) - len(
        {(tuple(e.prompt), *map(tuple, e.completions), e.label) for e in dataset.examples}
    )
    if len(config.files) > 1 and repeated:
        print(f"in all files together {repeated:,} examples repeat an earlier one")
    if dataset.bad:
        print("\n".join(list_bad(dataset)))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in dataset.examples[:rows]:
        marked = "in green" if colour else "in «…»"
        more = [f"{name} {value:g}" for name, value in (("margin", example.margin), ("weight", example.weight))]
        more = [text for text in more if text not in ("margin 0", "weight 1")]
        counts = f"supervised {marked}: {example.supervised:,} of {example.length:,} tokens"
        print(f"\n{example.source} ({', '.join([counts, *more])})")
        print(show(example, tokenizer, colour))
    return len(dataset.bad)


def _reading(config: AnyDataConfig) -> RowEncoder:
    """What the first rows of the files look like; rows that could be both are preferences."""
    if config.shape != "auto":
        return PREFERENCE_ENCODER if config.shape in get_args(PreferenceShapeName) else SFT_ENCODER
    rows = [row for name in config.files for row in read_rows(name, min(PEEKED, config.limit or PEEKED))]
    likeness = lambda encoder: sum(encoder.shapes.nearest(row.data)[1] for row in rows if isinstance(row, Row))  # noqa: E731
    return max(PREFERENCE_ENCODER, SFT_ENCODER, key=likeness)


def show(example: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """The text of an Example, its supervised stretches in green or in «…»; long stretches are shortened. Preferences have
    prompt and answers under headings, the best answer first."""
    answers = [_marked(ids, example.mask(i), tokenizer, colour) for i, ids in enumerate(example.completions)]
    prompt = _marked(example.prompt, [False] * len(example.prompt), tokenizer, colour)
    if example.rank is None and example.label is None:
        return prompt + answers[0]
    rank = example.rank or [0]
    if example.rank is None:
        headings = [f"labelled {str(example.label).lower()}"]
    elif sorted(rank) == [0, 1]:
        headings = ["rejected" if place else "chosen" for place in rank]
    else:
        headings = [f"rank {place}" for place in rank]
    best_first = sorted(range(len(rank)), key=lambda i: rank[i])
    parts = [("prompt", prompt), *((headings[i], answers[i]) for i in best_first)]
    return "\n".join(f"{heading}:\n{text}" for heading, text in parts)


def _marked(ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    text, at = "", 0
    while at < len(ids):
        until = next((i for i in range(at, len(ids)) if mask[i] != mask[at]), len(ids))
        stretch = _printable(tokenizer.decode(ids[at:until], clean_up_tokenization_spaces=False))
        if len(stretch) > HEAD + TAIL:
            stretch = f"{stretch[:HEAD]} […] {stretch[-TAIL:]}"
        text += f"{begin}{stretch}{end}" if mask[at] else stretch
        at = until
    return text


def _printable(text: str) -> str:
    """The text without the control characters that a row could steer a terminal with."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)
