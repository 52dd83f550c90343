"""Every kind of source, row format and chat template: rows read, used and dropped, with the reasons, as a page of tables.

    python benchmarks/sources.py [--data FOLDER] [--out docs/sources.md]

FOLDER: the demonstration files of LLaMA-Factory (../shared/data). The other rows are made (source_rows.py), and written in
each kind of source (source_kinds.py). The templates are those of the tests: as Qwen2.5's, Llama 3's, Llama 2's, Gemma's and
Qwen3's. The same page every time.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from source_kinds import KINDS, standing_in
from source_rows import SHAPES, Shape

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import SFT_ENCODER, Dataset, read_examples
from lowalign.data.preferences import PREFERENCE_ENCODER
from lowalign.errors import UserError
from tests.data import made

REAL = {  # files of LLaMA-Factory, and whether they are preferences
    "alpaca_en_demo.json": False,
    "glaive_toolcall_en_demo.json": False,
    "c4_demo.jsonl": False,
    "dpo_en_demo.json": True,
    "v1_dpo_demo.jsonl": True,
}
TEMPLATES = {
    "ChatML with tools": lambda: made.chatml(made.CHATML_TOOLS),
    "Llama 3": made.llama3,
    "Llama 2": made.FOUR["llama2"],
    "Gemma": made.gemma,
    "Qwen3": lambda: made.chatml(made.QWEN3),
    "none (ChatML)": lambda: made.chatml(None),
}
INTRODUCTION = """# Sources, row formats and templates

How many rows of each format are read and used, from each kind of source and with several chat templates, and why the others are
not. Made by `python benchmarks/sources.py --out docs/sources.md`; the made rows are in `benchmarks/source_rows.py`. Some of them
are wrong on purpose. What the words mean is in [Data](data.md) and [Preference data](preferences.md).
"""
KINDS_TEXT = """## Kinds of source

Used / read rows, with a ChatML template. `=`: the tokens, masks, ranks and weights are those of the JSONL file. `bz2` is a packed
CSV file, `saved` a folder of `save_to_disk`, `Dataset` one that is given from Python, `Hub` a data set of the Hub, here one that
a stand-in for `datasets.load_dataset` returns. Lists and objects in cells of CSV and TSV are JSON.
"""
TEMPLATES_TEXT = """## Chat templates

The same rows as JSONL. Templates with the same outcome share a line. Each is one that the tests made after a published one. Notes
in italics: how rows had to be changed.
"""
REAL_TEXT = """## Real files

The demonstration files of LLaMA-Factory.
"""


def read_source(name: str, shape: Shape, chat: Chat) -> Dataset:
    """The rows of a source."""
    config = PreferenceConfig if shape.preferences else DataConfig
    encoder = PREFERENCE_ENCODER if shape.preferences else SFT_ENCODER
    options = config(cache=False, preset=(shape.preset,) if shape.preset else (), on_error="skip")
    chat.notes.clear()
    return read_examples([name], chat, options, encoder=encoder)


def reasons(dataset: Dataset) -> str:
    """Why rows are not used, and how others were changed."""
    (file,) = dataset.report["files"]
    texts = [f"{places['rows']:,} dropped: {why}" for why, places in file["dropped"].items()]
    bad: dict[str, int] = {}
    for row in dataset.bad:
        bad[row.message] = bad.get(row.message, 0) + 1
    texts += [f"{count:,} bad: {why}" for why, count in bad.items()]
    texts += [f"*{count:,} cut: {what}*" for what, count in file["cut"].items()]
    texts += [f"*{count:,}: {note}*" for note, count in file["notes"].items()]
    return "; ".join(texts).replace("|", "\\|") or "–"


def counts(dataset: Dataset) -> tuple[int, int]:
    """Rows used and read."""
    (file,) = dataset.report["files"]
    return file["used"], file["rows"]


def kind_line(name: str, shape: Shape, kinds: Sequence[str], chat: Chat) -> str:
    """A line of the first table: a format in each kind of source."""
    cells, first = [], None
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder, standing_in():
            try:
                dataset = read_source(KINDS[kind](Path(folder), shape.rows), shape, chat)
            except (pyarrow.ArrowException, TypeError, datasets.exceptions.DatasetGenerationError):
                cells.append("not a table")  # a column holds values of different types
                continue
            except UserError as error:
                cells.append(f"refused: {str(error).replace(folder, '')}")
                continue
        examples = [replace(example, source="") for example in dataset.examples]
        first = examples if first is None else first
        used, rows = counts(dataset)
        cells.append(f"{used}/{rows}" + (" =" if examples == first else ""))
    return f"| {name} | " + " | ".join(cells) + " |"


def template_lines(name: str, source: str, shape: Shape, chats: dict[str, Chat]) -> list[str]:
    """Lines of the other tables: a file with each template; those with the same outcome are one line."""
    outcomes: dict[tuple, list[str]] = {}
    for template, chat in chats.items():
        dataset = read_source(source, shape, chat)
        (file,) = dataset.report["files"]
        formats = ", ".join(f"{shape} {count:,}" for shape, count in file["shapes"].items()) or "none"
        outcomes.setdefault((formats, *reversed(counts(dataset)), reasons(dataset)), []).append(template)
    lines = []
    for (formats, rows, used, why), templates in outcomes.items():
        which = "all" if len(templates) == len(chats) else ", ".join(templates)
        lines.append(f"| {name} | {formats} | {which} | {rows:,} | {used:,} | {why} |")
    return lines


def page(
    data: Path | None,
    shapes: Sequence[str] = tuple(SHAPES),
    kinds: Sequence[str] = tuple(KINDS),
    templates: Sequence[str] = tuple(TEMPLATES),
) -> str:
    """The page; without `data`, without the real files."""
    chats = {name: Chat(TEMPLATES[name]()) for name in templates}
    parts = [INTRODUCTION, KINDS_TEXT, f"| rows | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    parts += [kind_line(name, SHAPES[name], kinds, chats[templates[0]]) for name in shapes]
    head = ["| rows | format | template | read | used | dropped, bad or changed |", "|---|---|---|---|---|---|"]
    parts += ["", TEMPLATES_TEXT, *head]
    with tempfile.TemporaryDirectory() as folder:
        for name in shapes:
            parts += template_lines(name, KINDS["jsonl"](Path(folder), SHAPES[name].rows), SHAPES[name], chats)
    if data is not None:
        parts += ["", REAL_TEXT, *head]
        for name, preferences in REAL.items():
            parts += template_lines(name, str(data / name), Shape([], preferences), chats)
    return "\n".join(parts) + "\n"


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = page(options.data if options.data.is_dir() else None)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
