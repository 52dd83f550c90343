"""Every kind of source, row format and chat template: rows read, used and dropped, with the reasons, as a Markdown table.

    python benchmarks/sources.py [--data FOLDER]

FOLDER: the demonstration files of LLaMA-Factory (../shared/data). The made rows are those of the tests' presets, once in each
kind of file. The templates are those of the tests: as Qwen2.5's, Llama 3's, Llama 2's and Gemma's.
"""

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).parents[1]))

from lowalign.config.sections import DataConfig, PreferenceConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import SFT_ENCODER, read_examples
from lowalign.data.preferences import PREFERENCE_ENCODER
from tests.data import made
from tests.data.rows.test_presets import PREFERENCES, SFT

REAL = {  # rows for fine-tuning, and whether they are preferences
    "alpaca_en_demo.json": False,
    "glaive_toolcall_en_demo.json": False,
    "c4_demo.jsonl": False,
    "dpo_en_demo.json": True,
    "v1_dpo_demo.jsonl": True,
}


def files(folder: Path, preset: str, rows: list[dict]) -> Iterator[Path]:
    """The rows as JSONL, packed JSON and Parquet, where Parquet can hold them."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{preset}.jsonl").write_text(lines)
    yield folder / f"{preset}.jsonl"
    (folder / f"{preset}.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    yield folder / f"{preset}.json.gz"
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{preset}.parquet")
        yield folder / f"{preset}.parquet"
    except (pyarrow.ArrowException, OSError):
        return


def line(source: Path, preset: str, preferences: bool, template: str, chat: Chat) -> str:
    """One row of the table."""
    config = PreferenceConfig if preferences else DataConfig
    encoder = PREFERENCE_ENCODER if preferences else SFT_ENCODER
    options = config(cache=False, preset=(preset,) if preset else (), on_error="skip")
    data = read_examples([str(source)], chat, options, encoder=encoder)
    (file,) = data.report["files"]
    shapes = ", ".join(file["shapes"]) or "none"
    reasons = [f"{why} ({places['rows']})" for why, places in file["dropped"].items()]
    reasons += [f"bad: {row.message}" for row in data.bad[:1]] + [f"… and {len(data.bad) - 1} more bad"] * (
        len(data.bad) > 1
    )
    cells = (
        source.name,
        preset or "as it stands",
        shapes,
        template,
        file["rows"],
        file["used"],
        "; ".join(reasons) or "–",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    folder = parser.parse_args().data
    chats = {name: Chat(make()) for name, make in made.FOUR.items()}
    print("| source | preset | format | template | rows | used | dropped or bad, by reason |")
    print("|---|---|---|---|---|---|---|")
    for name, preferences in REAL.items():
        for template, chat in chats.items():
            print(line(folder / name, "", preferences, template, chat), flush=True)
    with tempfile.TemporaryDirectory() as made_folder:
        for preset, rows in (SFT | PREFERENCES).items():
            for source in files(Path(made_folder), preset, [row for row, _ in rows]):
                for template, chat in chats.items() if source.suffix == ".jsonl" else [("chatml", chats["chatml"])]:
                    print(line(source, preset, preset in PREFERENCES, template, chat), flush=True)


if __name__ == "__main__":
    main()
