"""`lowalign data check`: the report on files of rows, what should be cleaned, and examples with supervised tokens marked."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from lowalign.config.commands import AnyDataConfig, DataCheckConfig
from lowalign.config.sections import PreferenceShapeName
from lowalign.data.blocks import RowEncoder
from lowalign.data.chat import load_chat
from lowalign.data.cleaning.report import cleaning_report
from lowalign.data.cleaning.text import cleaning_lines, longest_lines, table
from lowalign.data.dataset import SFT_ENCODER, Dataset, list_bad, read_examples
from lowalign.data.losses import filter_by_loss, filter_lines
from lowalign.data.pack import Example
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.data.report import report_lines
from lowalign.data.rows.formats import RowFormats
from lowalign.data.rows.mapping import mappings_of
from lowalign.data.sources.row import Row
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from lowalign.model.base.hub import load_tokenizer

HEAD, TAIL = 800, 300  # characters shown of a long span
SAMPLE = 100  # rows of each file that decide whether they are preferences


def data_check(config: DataCheckConfig) -> int:
    """Run the command. Returns the exit code: 1 when training would refuse the rows."""
    data = replace(config.data, files=(*config.files, *config.data.files))
    return check(data, config.model, config.base.revision, config.rows, config.examples, config.json)


def check(
    config: AnyDataConfig,
    model: str,
    revision: str | None = None,
    rows: int = 3,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Print the report on config.files (formats, lengths, dropped rows, what should be cleaned) and the first `rows` Examples
    with their supervised tokens marked; write all Examples to `out`. Those that config.losses leaves out are counted alone.
    config.eval are compared with the others. as_json: print the report alone. Returns 1 when training would refuse the rows,
    else 0.

    Of `model` (a folder or a Hub id) only the tokenizer is loaded. Raises UserError when it or a file cannot be read.
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists; --examples writes a new file")
    tokenizer = load_tokenizer(model, revision)
    chat = load_chat(tokenizer, config)
    lenient, encoder = replace(config, on_error="skip"), _encoder(config)
    dataset = read_examples(config.files, chat, lenient, encoder=encoder)
    heldout = read_examples(config.eval, chat, lenient, heldout=True, encoder=encoder) if config.eval else None
    examples, filtered = filter_by_loss(dataset.examples, config) if dataset.examples else ([], {})
    cleaning = cleaning_report(examples, heldout.examples if heldout else (), dataset, tokenizer)
    parts = [dataset] + ([heldout] if heldout else [])
    refused = [reason for part in parts if (reason := _refused(part, config))]
    if as_json:
        reports = {"train": dataset.report} | ({"eval": heldout.report} if heldout else {})
        bad = [vars(row) for part in parts for row in part.bad]
        facts = {**reports, "cleaning": cleaning, "filtered": filtered, "bad": bad, "refused": refused}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        _print_reports(parts, filter_lines(filtered), cleaning, refused)
    if out is not None:
        write_jsonl(out, (_as_json(example, tokenizer) for example in examples))
        print(f"{len(examples):,} examples written to {out}", file=sys.stderr if as_json else sys.stdout)
    if not as_json:
        _print_examples(examples[:rows], tokenizer)
    return 1 if refused else 0


def _refused(dataset: Dataset, config: AnyDataConfig) -> str:
    """Why training would refuse these rows; "" when it would take them."""
    files = ", ".join(file["file"] for file in dataset.report["files"])
    if dataset.bad and config.on_error == "refuse":
        return f"{len(dataset.bad):,} rows of {files} cannot be used; --data.on-error skip leaves them out"
    return "" if dataset.examples else f"no row of {files} can be used"


def _print_reports(
    parts: Sequence[Dataset], filtered: Sequence[str], cleaning: dict[str, Any], refused: Sequence[str]
) -> None:
    for part in parts:
        print("\n".join([*report_lines(part.report), *(filtered if part is parts[0] else ())]))
        if part.bad:
            print("\n".join(list_bad(part)))
    print("\n".join(["", *table(cleaning), "", *cleaning_lines(cleaning), *longest_lines(cleaning)]))
    print("".join(f"training would refuse: {reason}\n" for reason in refused), end="")


def _print_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example in examples:
        marked = "in green" if colour else "in «…»"
        facts = [f"supervised {marked}: {example.supervised:,} of {example.length:,} tokens"]
        facts += [f"margin {example.margin:g}"] if example.margin else []
        facts += [f"weight {example.weight:g}"] if example.weight != 1 else []
        facts += [f"weights of its turns {', '.join(_turn_weights(example))}"] if example.token_weights else []
        print(f"\n{example.source} ({', '.join(facts)})")
        print(marked_text(example, tokenizer, colour))


def _turn_weights(example: Example) -> list[str]:
    """The weights of the supervised turns of a conversation, in their order."""
    (weights,) = example.token_weights
    return [f"{weight:g}" for weight, _ in groupby(weights) if weight]


def _as_json(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The Example as a line of the file of --examples; rank, label, margin and weights where it has them."""
    masks = [example.mask(i) for i in range(len(example.completions))]
    parts = [(example.prompt, [False] * len(example.prompt)), *zip(example.completions, masks, strict=True)]
    line = {"source": example.source, "prompt": example.prompt, "completions": example.completions, "masks": masks}
    line["text"] = [_marked(ids, mask, tokenizer, False, whole=True) for ids, mask in parts]
    defaults = {"rank": None, "label": None, "margin": 0.0, "weight": 1.0, "token_weights": None}
    return line | {name: getattr(example, name) for name in defaults if getattr(example, name) != defaults[name]}


def row_formats(config: AnyDataConfig) -> RowFormats:
    """The row formats that fit the first rows of config.files."""
    return _encoder(config).formats


def _encoder(config: AnyDataConfig) -> RowEncoder:
    """The encoder whose formats fit the first rows of the files better; the one for preferences if both fit."""
    if config.shape != "auto":
        return PREFERENCE_ENCODER if config.shape in get_args(PreferenceShapeName) else SFT_ENCODER
    mappings, limit = mappings_of(config, len(config.files)), min(SAMPLE, config.limit or SAMPLE)
    rows = [row for name, own in zip(config.files, mappings, strict=True) for row in own.rows(name, limit)]
    likeness = lambda encoder: sum(encoder.formats.nearest(row.data)[1] for row in rows if isinstance(row, Row))  # noqa: E731
    return max(PREFERENCE_ENCODER, SFT_ENCODER, key=likeness)


def marked_text(example: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """The text of an Example, its supervised spans in green or in «…», long spans shortened. Preferences have headings for
    prompt and answers, the best answer first."""
    answers = [_marked(ids, example.mask(i), tokenizer, colour) for i, ids in enumerate(example.completions)]
    prompt = _marked(example.prompt, [False] * len(example.prompt), tokenizer, colour)
    if example.rank is None and example.label is None:
        return prompt + answers[0]
    rank = example.rank or [0]
    if example.rank is None:
        headings = [f"labelled {str(example.label).lower()}"]
    elif sorted(rank) == [0, 1]:
        headings = ["rejected" if r else "chosen" for r in rank]
    else:
        headings = [f"rank {r}" for r in rank]
    best_first = sorted(range(len(rank)), key=lambda i: rank[i])
    parts = [("prompt", prompt), *((headings[i], answers[i]) for i in best_first)]
    return "\n".join(f"{heading}:\n{text}" for heading, text in parts)


def _marked(
    ids: list[int], mask: list[bool], tokenizer: PreTrainedTokenizerBase, colour: bool, whole: bool = False
) -> str:
    """The text of the ids, supervised spans marked; long spans shortened and control characters escaped, unless `whole`."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("«", "»")
    text = ""
    for supervised, span in groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0]):
        decoded = tokenizer.decode([i for _, i in span], clean_up_tokenization_spaces=False)
        decoded = decoded if whole else _escape_controls(decoded)
        if not whole and len(decoded) > HEAD + TAIL:
            decoded = f"{decoded[:HEAD]} […] {decoded[-TAIL:]}"
        text += f"{begin}{decoded}{end}" if supervised else decoded
    return text


def _escape_controls(text: str) -> str:
    """The text with control characters, which could change the terminal, as \\xNN."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)
