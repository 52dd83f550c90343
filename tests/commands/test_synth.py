"""`lowalign synth`: a tiny model that was trained on such rows writes new ones; killed and resumed it gives the same bytes."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowalign.cli import main
from lowalign.commands.synth import synth
from lowalign.commands.synth_writer import Writer
from lowalign.config.rows import SeedsConfig
from lowalign.config.sections import BaseConfig, DataConfig, Sampling
from lowalign.config.synth import SynthConfig
from lowalign.data.chat import Chat
from lowalign.data.cleaning.overlap import Known, common_subsequence, rouge_l
from lowalign.data.dataset import load_examples
from lowalign.data.seeds import read_seeds
from lowalign.durable import write_jsonl
from lowalign.errors import UserError
from lowalign.model.base.base import Base
from tests.commands.tiny_runs import load
from tests.tiny import tiny_model

COLOURS = ("red", "blue", "green", "black", "white", "gold", "pink", "grey")
ANIMALS = ("cat", "dog", "fox", "cow", "hen", "owl", "bee", "ant")
GUIDE = "Animals."
STEPS = 160
ROWS = [(f"Paint a {colour} {animal}.", f"A {animal}, {colour}.") for colour in COLOURS for animal in ANIMALS]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word with the space before it, and for each sign."""
    texts = [f"{GUIDE}\n\n### Task\n{prompt}\n\n### Answer\n{answer}\n" for prompt, answer in ROWS]
    pattern = Regex(r" ?\w+|###|[^\w]")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = dict.fromkeys([*special, *re.findall(r" ?\w+|###|[^\w]", "".join(texts))])
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def document(rng: random.Random) -> str:
    """A text as the templates of synth write it, with what is to follow."""
    shown = rng.sample(ROWS, 3)
    tasks = "".join(f"### Task\n{prompt}\n\n" for prompt, _ in shown)
    answered = "".join(f"### Task\n{prompt}\n\n### Answer\n{answer}\n\n" for prompt, answer in shown)
    return f"{GUIDE}\n\n{rng.choice((tasks, answered))}### Task"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """model: 2 layers, trained for some seconds on such texts. guide.txt, seeds.jsonl: six rows."""
    folder = tmp_path_factory.mktemp("synth")
    tokenizer, rng = word_tokenizer(), random.Random(0)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(STEPS):
        ids = tokenizer([document(rng) for _ in range(12)], add_special_tokens=False)["input_ids"]
        longest = max(map(len, ids))
        batch = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        model(batch, labels=batch.masked_fill(batch == 0, -100)).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, step / 10, (STEPS - step) / 60)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "guide.txt").write_text(GUIDE + "\n")
    write_jsonl(folder / "seeds.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS[::11]])
    (folder / "score.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    return folder


@pytest.fixture(scope="module")
def base(world) -> Base:
    return load(world / "model")


@pytest.fixture
def config(world, tmp_path) -> SynthConfig:
    return SynthConfig(
        str(world / "model"),
        world / "guide.txt",
        tmp_path / "rows.jsonl",
        20,
        SeedsConfig((str(world / "seeds.jsonl"),)),
        shown=2,  # the model was trained on three at a time
        max_similarity=1.0,
        batch=8,
        sampling=Sampling(max_new_tokens=24, top_p=0.95),
        base=BaseConfig(quantization="none", dtype="float32", device="cpu"),
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(config: SynthConfig) -> dict:
    return json.loads((config.out.parent / ".rows.jsonl.run" / "report.json").read_text())


def test_rows_are_new_tasks_with_their_answers_and_every_drop_is_counted(config, world, base, capsys):
    assert synth(config, base) == 0 and base.model.training is False
    rows, seeds = lines(config.out), {seed.prompt for seed in read_seeds(config.data.files)}
    prompts = [row["prompt"] for row in rows]
    assert len(rows) == 20 and len({prompt.lower() for prompt in prompts}) == 20 and not seeds & set(prompts)
    tasks, answers = map(set, zip(*ROWS, strict=True))
    good = sum(row["prompt"] in tasks and row["completion"] in answers for row in rows)
    assert good >= 15, rows  # what the model has learned to write
    assert all("#" not in row["prompt"] + row["completion"] for row in rows)
    found = report(config)
    assert found["sampled"] == 8 * found["rounds"] == found["rows"] + sum(found["dropped"].values())
    assert found["dropped"]["a seed"] > 0 and found["dropped"]["an earlier row"] > 0
    recipe = rows[0]["recipe"]
    assert rows[0]["source"] == "synth:guide.txt" and recipe["model"] == config.model and recipe["round"] == 0
    assert (
        set(recipe["examples"]) <= {f"{config.data.files[0]}:{i}" for i in range(1, 7)} and len(recipe["examples"]) == 2
    )
    data = load_examples([str(config.out)], Chat(base.tokenizer), DataConfig(cache=False))  # sft reads them
    assert len(data.examples) == 20
    assert "20 rows are in" in capsys.readouterr().err


def test_killed_and_resumed_gives_the_same_bytes_and_more_rows_continue(config, base, tmp_path, monkeypatch):
    whole = replace(config, out=tmp_path / "whole" / "rows.jsonl", n=24)
    whole.out.parent.mkdir()
    assert synth(whole, base) == 0
    real, rounds = Writer.round, []

    def killed(self, number):
        rounds.append(number)
        if len(rounds) in (2, 4):
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(Writer, "round", killed)
    for attempt in range(3):
        try:
            assert synth(replace(config, resume=attempt > 0), base) == 0
        except KeyboardInterrupt:
            with (tmp_path / ".rows.jsonl.run" / "rounds.jsonl").open("a") as file:
                file.write('{"round": 9, "ro')
    assert rounds[:5] == [0, 1, 1, 2, 2]
    assert config.out.read_bytes() == b"".join(whole.out.read_bytes().splitlines(keepends=True)[:20])
    with pytest.raises(UserError, match="go on with --resume"):
        synth(config, base)
    with pytest.raises(UserError, match="batch: 8 -> 9"):
        synth(replace(config, resume=True, batch=9), base)
    assert synth(replace(config, resume=True, n=24), base) == 0
    assert config.out.read_bytes() == whole.out.read_bytes()


def test_the_best_answer_is_kept(config, world, base):
    """By a function, the shortest of the finished ones; by the model itself, one of them."""
    scored = replace(
        config, n=4, answers=3, reward=(f"{world / 'score.py'}:short",), sampling=Sampling(max_new_tokens=24)
    )
    assert synth(scored, base) == 0
    writer = Writer(scored, read_seeds(config.data.files), Chat(base.tokenizer))
    writer.load(base)
    assert writer._best("q", ["long answer", "no", "middle"]) == (1, -2.0) and writer._best("q", ["a"]) == (0, None)
    rows = lines(config.out)
    assert all(row["reward"] == -len(row["completion"]) for row in rows if "reward" in row) and any(
        "reward" in row for row in rows
    )
    asked = replace(config, out=config.out.with_name("asked.jsonl"), n=2, answers=2)
    assert synth(asked, base) == 0 and len(lines(asked.out)) == 2


def test_it_stops_where_nothing_new_comes(config, base, capsys):
    config = replace(config, max_similarity=0.2, patience=2)
    assert synth(config, base) == 1
    assert "stopped: the last 2 rounds gave no row" in capsys.readouterr().err and report(config)["rounds"] <= 20


def test_idle_rounds_before_a_stop_count(config, base, monkeypatch):
    row = {"prompt": "p", "completion": "c"}
    line = lambda self, number: {"round": number, "rows": [] if number else [row], "dropped": {}}  # noqa: E731
    monkeypatch.setattr(Writer, "round", line)
    assert synth(replace(config, patience=2), base) == 1 and report(config)["rounds"] == 3
    assert synth(replace(config, patience=3, resume=True), base) == 1 and report(config)["rounds"] == 4


def test_only_finished_answers_count_and_the_first_of_equals_is_kept(config, base, monkeypatch):
    writer = Writer(config, read_seeds(config.data.files), Chat(base.tokenizer))
    writer.judge = lambda pairs: [pair.line("tie") for pair in pairs]
    sampled = [[("cut", False), ("", True), ("b", True), ("a", True)], [("cut", False)]]
    monkeypatch.setattr(writer, "_sample", lambda *_: sampled)
    dropped = Counter()
    rows = writer._answered([("p", []), ("q", [])], 0, dropped)
    assert [(row["prompt"], row["completion"]) for row in rows] == [("p", "b")] and dropped == {"unanswered": 1}


def test_examples_that_do_not_fit(config, base, tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "Paint a cat. " * 100, "completion": "A cat."}])
    long = replace(config, data=SeedsConfig((str(tmp_path / "long.jsonl"),)))
    with pytest.raises(UserError, match="the base has positions for 256: give a lower --shown"):
        synth(long, base)


def test_a_chat_model_is_asked_in_turns_with_templates_of_the_user(config, world, base, tmp_path, monkeypatch):
    (tmp_path / "ask.jinja").write_text(
        "{% for example in examples %}{{ example.prompt }};{% endfor %} chat={{ chat }}"
    )
    (tmp_path / "answer.jinja").write_text("answer {{ prompt }}")
    config = replace(
        config, ask="chat", prompt_template=tmp_path / "ask.jinja", answer_template=tmp_path / "answer.jinja"
    )
    writer = Writer(config, read_seeds(config.data.files), Chat(base.tokenizer))
    writer.load(base)
    seen = []
    monkeypatch.setattr(
        writer.host,
        "generate",
        lambda ids, n, *a, **k: (seen.extend(map(base.tokenizer.decode, ids)), [[] for _ in ids])[1],
    )
    text = writer.ask_prompt.render(**writer._values(read_seeds(config.data.files)[:2]))
    writer._sample([text], 1, [0], 0)
    assert text == "Paint a red cat.;Paint a blue cow.; chat=True"
    assert seen == [base.tokenizer.decode(writer.chat.prompt_ids([{"role": "user", "content": text}]))]


def test_rouge_l_against_the_table_of_the_definition():
    def table(a, b):
        best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
        return best[-1][-1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(0, 90))] for _ in range(2))
        assert common_subsequence(a, b) == table(a, b)
    assert rouge_l(["the", "cat", "sat"], ["the", "cat"]) == 0.8
    known = Known()
    known.add(["Name a red fruit.", "How old is the moon?"], "a seed")
    assert known.nearest("name a RED fruit!", 0.7) == (1.0, "a seed")
    assert known.nearest("Name a red car.", 0.7) == (0.75, "a seed") and known.nearest("Name cars.", 0.7) == (0.0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidelines", "no.txt"], "--guidelines no.txt cannot be read"),
        (["--guidelines", "empty.txt"], "--guidelines empty.txt is empty"),
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--reward", "score.py:short"], "--reward chooses among answers: give --answers 2 or more"),
        (["--sampling.temperature", "0"], "writes the same row again and again"),
        (["--max-similarity", "1.5"], "--max-similarity is 1.5; it must be above 0 and at most 1"),
        (["--answer-template", "empty.txt"], "the model never sees the prompt"),
        (["--prompt-template", "bad.jinja"], "bad.jinja:2: "),
        (["--prompt-template", "evil.jinja"], "evil.jinja:1: access to attribute"),
        (["--data", "docs.jsonl"], "docs.jsonl:1: a document has no prompt"),
        (["--data", "none.jsonl"], "none.jsonl: no rows"),
    ],
)
def test_what_is_held_wrong(words, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "bad.jinja").write_text("a\n{% if %}")
    (tmp_path / "evil.jinja").write_text("{{ ''.__class__.__mro__ }}")
    write_jsonl(tmp_path / "docs.jsonl", [{"text": "a document"}])
    flags = [
        "--model",
        str(world / "model"),
        "--guidelines",
        str(world / "guide.txt"),
        "--n",
        "2",
        "--out",
        "rows.jsonl",
    ]
    assert main(["synth", *flags, *words]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
