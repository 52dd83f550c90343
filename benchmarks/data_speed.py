"""CPU seconds and memory of reading and tokenizing 100,000 conversations, compared with a plain datasets.map.

    python benchmarks/data_speed.py [--rows 100000] [--model FOLDER]

The rows are made of random words: one to four questions and answers, a third with a system turn. Without a model, the
tokenizer is a byte-level BPE trained on the words, with ChatML. Each start is a process of its own:

first    lowalign, nothing cached
second   lowalign, from its cache
plain    datasets.map: one rendering a row, tokenized as a whole with offsets, the mask from the positions of the answers
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 splits
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def words(count: int) -> list[str]:
    """Made-up words, the first ones much more frequent in texts than the last."""
    syllables = ["ka", "lo", "mi", "ter", "sun", "bra", "ve", "dis", "ol", "gan", "pe", "ri", "sto", "qua", "zu", "fen"]
    draw = random.Random(0)
    return ["".join(draw.choices(syllables, k=draw.choice([1, 2, 2, 3]))) for _ in range(count)]


def make(folder: Path, rows: int, model: str | None) -> None:
    """Write the rows, and the tokenizer when no model is given."""
    draw, vocabulary = random.Random(1), words(20_000)
    weights = [1 / (k + 1) for k in range(len(vocabulary))]
    pool = draw.choices(vocabulary, weights, k=2_000_000)
    text = lambda n: " ".join(pool[(at := draw.randrange(len(pool) - n)) : at + n]) + "."  # noqa: E731
    with (folder / "rows.jsonl").open("w") as out:
        for number in range(rows):
            turns = [{"role": "system", "content": text(12)}] if number % 3 == 0 else []
            for _ in range(draw.choice([1, 1, 2, 4])):
                turns.append({"role": "user", "content": text(draw.randrange(5, 60))})
                turns.append({"role": "assistant", "content": text(draw.randrange(10, 200))})
            out.write(json.dumps({"messages": turns}) + "\n")
    if model is None:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([" ".join(pool[:200_000])], trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        made.chat_template = CHATML
        made.save_pretrained(folder / "model")


def lowalign(rows: Path, model: str) -> int:
    """Read the rows. -> the number of their tokens."""
    from lowalign.config.sections import DataConfig
    from lowalign.data.chat import Chat
    from lowalign.data.dataset import read_examples

    chat = Chat(AutoTokenizer.from_pretrained(model, trust_remote_code=False))
    return read_examples([str(rows)], chat, DataConfig()).report["tokens"]


def plain(rows: Path, model: str) -> int:
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
    dataset = dataset.map(encode, batched=True, remove_columns=["messages"])
    return sum(map(len, dataset["ids"]))


def child(what: str, rows: Path, model: str) -> None:
    """Measure one start and print it as JSON."""
    import torch  # noqa: F401  both are used in training, which imports it

    before = time.process_time()
    since = time.perf_counter()
    tokens = (plain if what == "plain" else lowalign)(rows, model)
    figures = {"cpu": time.process_time() - before, "wall": time.perf_counter() - since, "tokens": tokens}
    status = dict(line.split(":", maxsplit=1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps(figures | {"peak_mb": int(status["VmHWM"].split()[0]) // 1024}))


def main() -> None:
    """Run the three starts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", help="folder with a tokenizer; plain needs ChatML")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.child[2])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.rows, options.model)
        model = options.model or str(folder / "model")
        environment = os.environ | {"LOWALIGN_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "true"}
        for start in ("first", "second", "plain"):
            command = [sys.executable, __file__, "--child", start, str(folder / "rows.jsonl"), model]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(start, done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
