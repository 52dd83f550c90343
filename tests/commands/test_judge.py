"""`lowalign judge`: verdicts against stock transformers, the effect of the order of two answers, and resuming."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import lowalign.commands.judge
import lowalign.rewards.pairwise
from lowalign import Base, Host
from lowalign.cli import main
from lowalign.commands.judge import judge
from lowalign.config.evaluation import JudgeConfig
from lowalign.config.rows import AnswersConfig
from lowalign.config.sections import BaseConfig
from lowalign.data.chat import Chat
from lowalign.errors import UserError
from lowalign.rewards.judge_prompt import letter_question
from lowalign.rewards.pairwise import verdict
from tests.tiny import tiny_folder, tiny_tokenizer

FP32 = BaseConfig(quantization="none", dtype="float32", device="cpu")
CHAT = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)
ASKED = "{{ prompt }} / {{ a }} / {{ b }}: A or B?"
ANSWERS = ["Paris", "It is Paris.", "The lazy dog", "What?"]
ROWS = [
    {"prompt": "What is the capital of France?", "completions": ANSWERS},
    {"prompt": [{"role": "user", "content": "Name a fox."}], "completion_a": "quick", "completion_b": "brown"},
    {"prompt": "Jump", "completion": "over", "stopped": True},
    {"prompt": "Jump", "completion": "the dog", "stopped": True},
    {"prompt": "alone", "completion": "nothing to compare"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(model, tmp_path) -> JudgeConfig:
    template = tmp_path / "ask.jinja"
    template.write_text(ASKED)
    return JudgeConfig(
        tmp_path / "out",
        AnswersConfig((write(tmp_path / "rows.jsonl", ROWS),)),
        str(model),
        template=template,
        base=FP32,
    )


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != ".lock"}


@pytest.mark.parametrize("adapter", [False, True])
def test_log_odds_equal_stock(adapter, config, model, tmp_path):
    """Each order rendered and tokenized by transformers, one row through the stock model, full logits."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    if adapter:
        torch.manual_seed(3)
        peft = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(stock, peft).save_pretrained(tmp_path / "lora")
        stock = transformers.AutoModelForCausalLM.from_pretrained(model)
        stock = PeftModel.from_pretrained(stock, tmp_path / "lora").eval()
        config = replace(config, adapter=str(tmp_path / "lora"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]

    def stock_odds(prompt, a, b):
        message = {"role": "user", "content": f"{prompt} / {a} / {b}: A or B?"}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        with torch.no_grad():
            logits = stock(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        first, second = logits.double().log_softmax(-1)[letters].tolist()
        return first - second

    assert judge(config) == 0
    expected = [(ROWS[0]["prompt"], *pair) for pair in itertools.combinations(ANSWERS, 2)]
    expected += [("user: Name a fox.", "quick", "brown"), ("Jump", "over", "the dog")]
    lines = read(config.out / "verdicts.jsonl")
    assert len(lines) == len(expected)
    for line, (prompt, a, b) in zip(lines, expected, strict=True):
        assert abs(line["first"] - stock_odds(prompt, a, b)) <= 1e-5
        assert abs(line["swapped"] - stock_odds(prompt, b, a)) <= 1e-5
    assert max(abs(line["first"]) for line in lines) > 0.1  # so that 1e-5 means something


def test_letters_are_where_the_template_puts_them():
    """Text that the template writes before an answer (a space, an empty thought) belongs to the prompt of the letter."""
    tokenizer = tiny_tokenizer()
    template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<think></think>{% endif %} {{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    example = letter_question(Chat(tokenizer, template), "Which?")
    assert tokenizer.decode(example.prompt).removeprefix("<s>") == "user: Which?assistant:<think></think> "
    assert [tokenizer.decode(c) for c in example.completions] == ["A", "B"]


@pytest.mark.parametrize(
    ("first", "swapped", "margin", "expected"),
    [
        (2.0, -1.0, 0.0, "a"),
        (-0.1, 0.3, 0.0, "b"),
        (2.0, 1.0, 0.0, "changed"),  # always the first place
        (-2.0, -1.0, 0.0, "changed"),  # always the second
        (2.0, -1.0, 1.5, "a"),  # the mean for a is (2 + 1) / 2
        (2.0, -1.0, 1.6, "tie"),
        (-2.0, 1.0, 1.6, "tie"),
        (0.0, -1.0, 0.0, "tie"),
    ],
)
def test_the_verdict_of_two_orders(first, swapped, margin, expected):
    assert verdict(first, swapped, margin) == expected


TABLE = {  # log-odds of the first place
    ("good", "bad"): 2.0,
    ("bad", "good"): -1.0,
    ("good", "vain"): -0.5,
    ("vain", "good"): 0.25,
    ("bad", "vain"): 1.0,
    ("vain", "bad"): 3.0,
    ("same", "near"): 0.25,
    ("near", "same"): -0.25,
}


def test_pairs_disagreements_and_counts(config, monkeypatch):
    """With verdicts from a table: preferences, disagreements, and how often the first place won."""
    tokenizer = tiny_tokenizer()

    def look_up(host, questions, budget):
        texts = [tokenizer.decode(question.prompt).partition("<<")[2].partition(">>")[0] for question in questions]
        return [TABLE[tuple(text.split("|"))] for text in texts]

    monkeypatch.setattr(lowalign.rewards.pairwise, "log_odds", look_up)
    config.template.write_text("<<{{ a }}|{{ b }}>>")
    messages = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": "p", "completions": ["good", "bad", "vain", "good", " "]},
        {"prompt": messages, "completion_a": "same", "completion_b": "near"},
        {"prompt": messages, "completion_a": "bad", "completion_b": [{"role": "assistant", "content": "good"}]},
        {"prompt": "long", "completion_a": "very " * 200, "completion_b": "short"},
    ]
    write(Path(config.data.files[0]), rows)
    config = replace(config, margin=0.3, max_length=200)
    assert judge(config) == 0
    good, bad = ([{"role": "assistant", "content": text}] for text in ("good", "bad"))
    assert read(config.out / "pairs.jsonl") == [  # plain text stays plain text
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": "p", "chosen": "vain", "rejected": "good"},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},  # bad against the other good
        {"prompt": "p", "chosen": "vain", "rejected": "good"},
        {"prompt": messages, "chosen": good, "rejected": bad},
    ]
    where = config.data.files[0]
    odds = {"first": 1.0, "swapped": 3.0}
    numbers = {"source": f"{where}:1", "a": 1, "b": 2, "verdict": "changed", **odds}
    changed, tie = read(config.out / "disagreements.jsonl")
    assert changed == numbers | {"prompt": "p", "completion_a": "bad", "completion_b": "vain"}
    assert (tie["source"], tie["verdict"], tie["completion_a"]) == (f"{where}:2", "tie", "same")
    # 7 pairs in two orders; a for good|bad, bad|good, vain|good, good|vain, same|near in one of two; bad|vain in both.
    assert json.loads((config.out / "report.json").read_text()) == {
        "pairs": 13,
        "agreed": 5,
        "changed": 1,
        "ties": 1,
        "skipped": {"both answers are the same": 1, "an answer is empty": 4, "longer than --max-length": 1},
        "first_place": 8 / 14,
    }


def test_cut_anywhere_and_resumed(config, monkeypatch):
    """With any part of verdicts.jsonl left by a kill, the same command with --resume writes the same bytes."""
    monkeypatch.setattr(lowalign.commands.judge, "PAIRS_PER_BLOCK", 3)
    assert judge(config) == 0
    whole = files(config.out)
    verdicts = config.out / "verdicts.jsonl"
    raw = whole["verdicts.jsonl"]
    ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")]
    counts = []
    count = lowalign.rewards.pairwise.log_odds
    monkeypatch.setattr(
        lowalign.rewards.pairwise, "log_odds", lambda *args: counts.append(len(args[1])) or count(*args)
    )
    cuts = {0: [6, 6, 4], 1: [6, 6, 4], ends[1]: [6, 6, 4], ends[2] - 1: [6, 6, 4], ends[2]: [6, 4]}
    cuts |= {ends[4] + 7: [6, 4], ends[6]: [4], len(raw) - 1: [4], len(raw): []}
    for at, questions in cuts.items():
        verdicts.write_bytes(raw[:at])
        for name in ("pairs.jsonl", "disagreements.jsonl", "report.json"):
            (config.out / name).unlink()
        counts.clear()
        assert judge(replace(config, resume=True)) == 0
        assert files(config.out) == whole, at
        assert counts == questions, at  # two for each pair of every block that is not complete
    for tail in (b"\0" * 64, b'{"source"', b"[1]\n"):
        verdicts.write_bytes(raw[: ends[2]] + tail)
        assert judge(replace(config, resume=True)) == 0
        assert files(config.out) == whole


def test_a_failure_keeps_the_blocks_before_it(config, monkeypatch):
    monkeypatch.setattr(lowalign.commands.judge, "PAIRS_PER_BLOCK", 3)
    work, calls = lowalign.rewards.pairwise.log_odds, []

    def fail(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return work(*args)

    monkeypatch.setattr(lowalign.rewards.pairwise, "log_odds", fail)
    with pytest.raises(MemoryError):
        judge(config)
    kept = (config.out / "verdicts.jsonl").read_bytes()
    assert kept.count(b"\n") == 6
    assert judge(replace(config, resume=True)) == 0
    assert len(calls) == 4
    assert (config.out / "verdicts.jsonl").read_bytes().startswith(kept)


def test_resuming_something_else_is_refused(config):
    assert judge(config) == 0
    before = files(config.out)
    with pytest.raises(UserError, match="holds results of an earlier run: go on with --resume"):
        judge(config)
    with pytest.raises(UserError, match=r"margin: 0\.0 -> 1\.0"):
        judge(replace(config, resume=True, margin=1.0))
    Path(config.template).write_text(ASKED + " ")
    with pytest.raises(UserError, match="template: the content has changed"):
        judge(replace(config, resume=True))
    Path(config.template).write_text(ASKED)
    write(Path(config.data.files[0]), [ROWS[0] | {"completions": [*ANSWERS[:3], "Who?"]}, *ROWS[1:]])
    with pytest.raises(UserError, match="data: the content has changed"):
        judge(replace(config, resume=True))
    assert files(config.out) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{{ a }}\n{{ b }}\n{% if %}", r"ask.jinja:3: "),
        ("{{ a }}\n{{ b }} {{ answer }}", r"ask.jinja:2: 'answer' is undefined .*has the variables prompt, a and b"),
        ("{{ prompt }} {{ a }}", r"ask.jinja: the judge never sees answer b; write \{\{ b \}\}"),
        ("{{ a }}{{ b }}\n\n{{ a.__class__.__mro__ }}", r"ask.jinja:3: access to attribute '__class__' .* is unsafe"),
    ],
)
def test_errors_in_the_template(config, text, says):
    config.template.write_text(text)
    with pytest.raises(UserError, match=says):
        judge(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"promt": "p", "completions": []}, 'expected "prompt", found "promt"; did you mean "prompt"?'),
        ({"prompt": "p", "completion_a": "x"}, 'expected "completion_b", found "completion_a"'),
        ({"prompt": "p", "chosen": "x"}, 'expected "completions", found "chosen"'),
        ({"prompt": "p", "completions": "x"}, '"completions" must be a list of answers, found a string'),
        ({"prompt": "p", "completions": ["x", {"txt": "y"}]}, 'completions[1]: expected "completion"'),
        ({"prompt": 3, "completions": []}, '"prompt" must be text or a list of turns, found a number'),
    ],
)
def test_errors_in_the_rows(config, row, says):
    write(Path(config.data.files[0]), [ROWS[0], row])
    with pytest.raises(UserError) as error:
        judge(config)
    assert str(error.value).startswith(f"{config.data.files[0]}:2: {says}")


def test_nothing_to_compare(config):
    write(Path(config.data.files[0]), [ROWS[2], ROWS[4]])
    with pytest.raises(UserError, match="no two answers to one prompt in"):
        judge(config)


def test_a_function_judges(config, tmp_path, capsys):
    """Each answer is scored once; no model is loaded, and no place is favoured."""
    (tmp_path / "worth.py").write_text(
        "def shorter(prompts, completions):\n"
        "    with open(__file__ + '.asked', 'a') as file:\n"
        "        print(*completions, sep='\\n', file=file)\n"
        "    return [-len(c) for c in completions]\n"
    )
    where = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completions": ["aa", "b", "cc", ""]}])
    out = tmp_path / "scored"
    assert main(["judge", "--reward", f"2*{tmp_path / 'worth.py'}:shorter", "--data", where, "--out", str(out)]) == 0
    assert (tmp_path / "worth.py.asked").read_text() == "aa\nb\ncc\n"
    lines = read(out / "verdicts.jsonl")
    assert [(x["verdict"], x.get("scores")) for x in lines[:2]] == [("b", [-4.0, -2.0]), ("tie", [-4.0, -4.0])]
    assert read(out / "pairs.jsonl") == [
        {"prompt": "p", "chosen": "b", "rejected": "aa"},
        {"prompt": "p", "chosen": "b", "rejected": "cc"},
    ]
    stderr = capsys.readouterr().err
    assert "3 of 6 pairs judged: 2 with a winner, 1 ties\n3 pairs skipped: an answer is empty" in stderr
    (tmp_path / "worth.py").write_text("def shorter(prompts, completions):\n    return [len(c) for c in completions]\n")
    again = ["judge", "--reward", f"2*{tmp_path / 'worth.py'}:shorter", "--data", where, "--out", str(out), "--resume"]
    assert main(again) == 1
    assert "worth.py: the content has changed" in capsys.readouterr().err


@pytest.mark.parametrize("prompt_format", ["text", "chat"])
def test_a_reward_run_judges(model, tmp_path, prompt_format):
    """Its scores are those of the stock sequence classifier on the stock rendering of prompt and answer, or on plain text."""
    host = Host(Base.load(model, quantization="none", dtype="float32", device="cpu", quiet=True))
    torch.manual_seed(5)
    host.add("r", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    host.add_scalar_head("r")
    host.save("r", tmp_path / "reward", method="reward", files={"chat_template.jinja": CHAT})
    where = write(tmp_path / "rows.jsonl", [ROWS[0]])
    out = tmp_path / "out"
    config = JudgeConfig(out, AnswersConfig((where,)), str(model), reward=(str(tmp_path / "reward"),), base=FP32)
    assert judge(replace(config, data=replace(config.data, prompt_format=prompt_format))) == 0

    stock = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    stock = PeftModel.from_pretrained(stock, tmp_path / "reward").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    scores = []
    for answer in ANSWERS:
        turns = [{"role": "user", "content": ROWS[0]["prompt"]}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        ids = tokenizer(text)["input_ids"]
        if prompt_format == "text":
            ids = [i for part in (ROWS[0]["prompt"], answer) for i in tokenizer(part)["input_ids"]]
            ids.append(tokenizer.eos_token_id)
        with torch.no_grad():
            scores.append(stock(input_ids=torch.tensor([ids])).logits.item())
    lines = read(out / "verdicts.jsonl")
    for line, (a, b) in zip(lines, itertools.combinations(scores, 2), strict=True):
        assert line["scores"] == pytest.approx([a, b], abs=1e-5)
        assert line["verdict"] == ("a" if a > b else "b")
    assert {line["verdict"] for line in lines} == {"a", "b"}


def test_flags_that_do_not_go_together(capsys):
    ask = ["judge", "--data", "rows.jsonl", "--out", "o"]
    assert main(ask) == 1
    assert main([*ask, "--reward", "f.py:f", "--template", "t"]) == 1
    assert main([*ask, "--model", "m", "--margin", "-1"]) == 1
    stderr = capsys.readouterr().err
    for words in (
        "no judge: give --model M",
        "are options of a judge model",
        "--margin is -1.0; it must be at least 0",
    ):
        assert words in stderr


def test_a_function_judges_with_columns_of_the_rows(config, tmp_path, capsys):
    """Each answer is scored against the `answer` of its own row: 1 for a hit, 0 for a miss."""
    rows = [
        {"prompt": f"{n} + {n}?", "answer": 2 * n, "completion_a": str(2 * n), "completion_b": str(n)}
        for n in range(2, 6)
    ]
    file = tmp_path / "f.py"
    file.write_text(
        "def hit(prompts, completions, answer):\n    return [float(c == str(a)) for c, a in zip(completions, answer)]\n"
    )
    data = AnswersConfig((write(tmp_path / "sums.jsonl", rows),))
    mine = replace(config, data=data, reward=(f"{file}:hit",), template=None, model=None, out=tmp_path / "sums")
    assert judge(mine) == 0
    lines = read(tmp_path / "sums/verdicts.jsonl")
    assert [(line["verdict"], line["scores"]) for line in lines] == [("a", [1.0, 0.0])] * 4
    for parameter in ("solution", "stopped", "completion_ids"):
        file.write_text(f"def hit(prompts, completions, {parameter}):\n    return [0.0] * len(completions)\n")
        with pytest.raises(UserError, match=f"f.py:1: hit requires {parameter}, which is"):
            judge(replace(mine, out=tmp_path / parameter))
