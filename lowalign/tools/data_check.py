"""`lowalign data check`: what is recognised in files of rows, what is lost, and what of a row is learnt."""

import os
import re
import sys
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from lowalign.config import DataConfig
from lowalign.data.chat import load_chat
from lowalign.data.dataset import list_bad, read_examples
from lowalign.data.pack import Example
from lowalign.data.report import describe
from lowalign.model.files import load_tokenizer

HEAD, TAIL = 800, 300  # characters shown of a long stretch


def check(config: DataConfig, model: str, revision: str | None = None, rows: int = 3) -> int:
    """Print what was recognised in config.files, lengths, drops and duplicates, and the first `rows` Examples with their
    supervised tokens marked. Returns the number of bad rows.

    Only the tokenizer of `model` (a folder or a Hub id) is loaded. Raises UserError when it or a file cannot be read.
    """
    tokenizer = load_tokenizer(model, revision)
    chat = load_chat(tokenizer, config.template)
    dataset = read_examples(config.files, chat, replace(config, on_error="skip"), tokenizer=tokenizer)
    print("\n".join(describe(dataset.report)))
    repeated = len(dataset.examples) - len({(tuple(e.prompt), *map(tuple, e.completions)) for e in dataset.examples})
    if len(config.files) > 1 and repeated:
        print(f"in all files together {repeated:,} examples repeat an earlier one")
    if dataset.bad:
        print("\n".join(list_bad(dataset)))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in dataset.examples[:rows]:
        marked = "in green" if colour else "in «…»"
        print(f"\n{example.source} (supervised {marked}: {example.supervised:,} of {example.length:,} tokens)")
        print(show(example, tokenizer, colour))
    return len(dataset.bad)


def show(example: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """The text of an Example, its supervised stretches in green or in «…»; long stretches are shortened."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    ids = example.prompt + example.completions[0]
    mask = [False] * len(example.prompt) + example.mask(0)
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
