"""CPU seconds and memory of reading and tokenizing conversations, compared with a plain datasets.map.

    python benchmarks/data_speed.py [--rows 100000] [--model FOLDER] [--processes 1]
    python benchmarks/data_speed.py --gigabytes 3 --words --processes 2 --starts first second

The rows are made of random words: one to four questions and answers, a third with a system turn. Without a model, the
tokenizer is a byte-level BPE trained on the words, with ChatML. --words: prompts and completions of longer words, and a tokenizer
that only looks words up, which takes less time. Files of more than 100 MB repeat their rows. Each start is a process of its own:

first    lowalign, nothing cached; then held-out rows, the cleaning report and the rows of 1,000 steps, as a run takes them
second   the same, from its cache
plain    datasets.map: one rendering a row, tokenized as a whole with offsets, the mask from the positions of the answers

Memory is sampled over the process and its children: pss counts shared pages in parts, anon is pss without the pages of files, which
the system takes back when it needs them.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import psutil
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 splits
REPEATED = 100e6  # bytes after which the rows of a large file begin again
SPECIAL, UNKNOWN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "?"
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def words(count: int, parts: int) -> list[str]:
    """Made-up words of one to three syllables (of so many `parts`), the first ones much more frequent in texts than the last."""
    syllables = ["ka", "lo", "mi", "ter", "sun", "bra", "ve", "dis", "ol", "gan", "pe", "ri", "sto", "qua", "zu", "fen"]
    draw = random.Random(0)
    return ["".join(draw.choices(syllables, k=parts * draw.choice([1, 2, 2, 3]))) for _ in range(count)]


def make(folder: Path, rows: int, size: float, model: str | None, word_level: bool) -> None:
    """Write the rows (so many, or until the file has `size` bytes), and the tokenizer when no model is given."""
    draw, vocabulary = random.Random(1), words(20_000, 3 if word_level else 1)
    weights = [1 / (k + 1) for k in range(len(vocabulary))]
    pool = draw.choices(vocabulary, weights, k=2_000_000)
    text = lambda n: " ".join(pool[(at := draw.randrange(len(pool) - n)) : at + n]) + "."  # noqa: E731
    lines, written = [], 0
    for number in count():
        if number >= rows and written >= min(size, REPEATED):
            break
        if word_level:
            row = {"prompt": text(draw.randrange(5, 60)), "completion": text(draw.randrange(100, 500))}
        else:
            turns = [{"role": "system", "content": text(12)}] if number % 3 == 0 else []
            for _ in range(draw.choice([1, 1, 2, 4])):
                turns.append({"role": "user", "content": text(draw.randrange(5, 60))})
                turns.append({"role": "assistant", "content": text(draw.randrange(10, 200))})
            row = {"messages": turns}
        lines.append(json.dumps(row) + "\n")
        written += len(lines[-1])
    with (folder / "rows.jsonl").open("w") as out:
        for _ in range(max(1, round(size / written))):
            out.writelines(lines)
    if model is None and word_level:
        tokenizer = Tokenizer(
            models.WordLevel({w: i for i, w in enumerate([UNKNOWN, "\n", *SPECIAL, *vocabulary, "."])}, UNKNOWN)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" |\.(?=<)|\n"), "isolated")
        tokenizer.add_special_tokens(SPECIAL)
        save(tokenizer, folder)
    elif model is None:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=8000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([" ".join(pool[:200_000])], trainer)
        save(tokenizer, folder)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer with ChatML."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHATML
    made.save_pretrained(folder / "model")


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def lowalign(rows: Path, model: str, processes: int) -> int:
    """Read the rows and take some as a run does. -> the number of their tokens."""
    from lowalign.config.sections import DataConfig
    from lowalign.data.chat import Chat
    from lowalign.data.cleaning.report import cleaning_report
    from lowalign.data.dataset import read_examples, split_heldout
    from lowalign.data.mixture import order_of

    chat = Chat(AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    since, before = time.perf_counter(), cpu()
    data = read_examples([str(rows)], chat, DataConfig(processes=processes))
    read, read_cpu = time.perf_counter() - since, cpu() - before
    train, heldout = split_heldout(data.examples, 200, 0)
    report = cleaning_report(train, heldout, data, chat.tokenizer)
    cleaned = time.perf_counter() - since - read
    taken = sum(train[i].length for step in range(1000) for i in order_of(train, 16, 0, step))
    steps = time.perf_counter() - since - read - cleaned
    figures = {
        "read": read,
        "its CPU": read_cpu,
        "cleaning": cleaned,
        "1000 steps of 16": steps,
        "tokens of them": taken,
    }
    print(json.dumps(figures | {"rows": len(train), "compared": report["compared"]}), file=sys.stderr)
    return data.report["tokens"]


def plain(rows: Path, model: str, processes: int) -> int:
    """The same with datasets.map, for ChatML. -> the number of tokens."""
    import datasets

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in batch["messages"]]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        masks = []
        for text, offsets in zip(texts, encoded["offset_mapping"], strict=True):
            answers = [match.span(1) for match in ANSWER.finditer(text)]
            masks.append([any(a <= start < b for a, b in answers) for start, _ in offsets])
        return {"ids": encoded["input_ids"], "mask": masks}

    dataset = datasets.Dataset.from_json(str(rows), cache_dir=str(rows.parent / "arrow"))
    dataset = dataset.map(
        encode, batched=True, remove_columns=["messages"], num_proc=processes if processes > 1 else None
    )
    return sum(len(ids) for batch in dataset.iter(1000) for ids in batch["ids"])


def child(what: str, rows: Path, model: str, processes: int) -> None:
    """Do one start and print its figures as JSON."""
    import torch  # noqa: F401  both are used in training, which imports it

    before, since = cpu(), time.perf_counter()
    tokens = (plain if what == "plain" else lowalign)(rows, model, processes)
    print(json.dumps({"cpu": cpu() - before, "wall": time.perf_counter() - since, "tokens": tokens}))


def memory(process: psutil.Process) -> dict[str, int]:
    """MiB of a process, and of it with its children."""
    sums = {"main_rss": 0, "main_anon": 0, "pss": 0, "anon": 0}
    for k, one in enumerate([process, *process.children(recursive=True)]):
        with contextlib.suppress(OSError, psutil.Error, ValueError):
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
            kb = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
            sums["pss"] += kb["Pss"] // 1024
            sums["anon"] += kb["Pss_Anon"] // 1024
            if k == 0:
                sums |= {"main_rss": kb["Rss"] // 1024, "main_anon": kb["Pss_Anon"] // 1024}
    return sums


def measured(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """The figures that a start prints, and the most memory of it."""
    load, most = os.getloadavg()[0], {}
    with tempfile.TemporaryFile("w+") as out:
        started = subprocess.Popen(command, env=environment, stdout=out)
        process = psutil.Process(started.pid)
        while started.poll() is None:
            with contextlib.suppress(psutil.Error):
                most = {name: max(value, most.get(name, 0)) for name, value in memory(process).items()}
            time.sleep(0.5)
        out.seek(0)
        figures = json.loads(out.read().strip().splitlines()[-1])
    return figures | most | {"load": [load, os.getloadavg()[0]]}


def main() -> None:
    """Run the starts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--gigabytes", type=float, default=0.0, help="size of the file, instead of rows")
    parser.add_argument("--processes", type=int, default=1, help="of lowalign, and num_proc of datasets.map")
    parser.add_argument("--words", action="store_true", help="a tokenizer that looks words up")
    parser.add_argument("--starts", nargs="+", default=["first", "second", "plain"])
    parser.add_argument("--model", help="folder with a tokenizer; plain needs ChatML")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.child[2], options.processes)
        return
    rows = options.rows if options.rows is not None else 0 if options.gigabytes else 100_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, rows, options.gigabytes * 1e9, options.model, options.words)
        model = options.model or str(folder / "model")
        print(f"{(folder / 'rows.jsonl').stat().st_size / 1e9:.2f} GB", flush=True)
        environment = os.environ | {"LOWALIGN_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "true"}
        for start in options.starts:
            command = [sys.executable, __file__, "--processes", str(options.processes)]
            figures = measured([*command, "--child", start, str(folder / "rows.jsonl"), model], environment)
            print(
                start,
                json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in figures.items()}),
                flush=True,
            )


if __name__ == "__main__":
    main()
