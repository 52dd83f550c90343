"""`lowalign eval --data`: loss, perplexity, accuracy and margins against stock transformers and peft, in fp64 sums."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lowalign.cli import main
from lowalign.durable import write_jsonl
from lowalign.model.base.base import Base
from tests.commands.tiny_runs import FP32, make

SFT = [
    {"prompt": "The quick brown fox", "completion": " jumps over the lazy dog."},
    {"prompt": "What is the capital?", "completion": " Paris"},
    {"prompt": "Name a dog", "completion": " The lazy one, of course. It is quick."},
]
PAIRS = [
    {"prompt": f"Which of {i}?", "chosen": f" The quick {i} fox", "rejected": " the lazy dog jumps" * (1 + i % 2)}
    for i in range(9)
]
RANKED = [{"prompt": "Sort them", "completions": [" one fox", " two", " three dogs"], "ranks": [1, 0, 2]}]
BETA = 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("eval"))
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(stock, lora).save_pretrained(folder / "lora")
    write_jsonl(folder / "sft.jsonl", SFT)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "ranked.jsonl", RANKED)
    write_jsonl(folder / "labels.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    return folder


@pytest.fixture(scope="module")
def logp(world):
    """(adapter or None, prompt, completion) -> Σ log p of the completion and its eos in stock peft, and their number."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    plain = transformers.AutoModelForCausalLM.from_pretrained(world / "model").eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    models = {None: plain, "lora": PeftModel.from_pretrained(model, world / "lora").eval()}

    @torch.no_grad()
    def compute(adapter, prompt, completion):
        x, y = ids(prompt), [*ids(completion), tokenizer.eos_token_id]
        logits = models[adapter](torch.tensor([x + y])).logits[0, len(x) - 1 : -1]
        return logits.double().log_softmax(-1).gather(1, torch.tensor(y)[:, None]).sum().item(), len(y)

    return compute


def run(world, tmp_path, *data, options=("--adapter", "lora")) -> dict:
    out = tmp_path / "figures.json"
    options = [str(world / o) if (world / o).exists() else o for o in options]
    files = [str(world / name) for name in data]
    assert main(["eval", "--data", *files, "--model", str(world / "model"), "--out", str(out), *options, *FP32]) == 0
    found = json.loads(out.read_text())
    return {Path(name).name: figures for name, figures in found["results"].items()}


def expected_loss(logp, adapter, answers):
    sums, counts = zip(*(logp(adapter, prompt, text) for prompt, text in answers), strict=True)
    return -sum(sums) / sum(counts), sum(counts)


def test_loss_and_perplexity_equal_stock_peft(world, logp, tmp_path):
    found = run(world, tmp_path, "sft.jsonl")
    losses = {}
    for name, adapter in (("base", None), ("lora", "lora")):
        losses[name], tokens = expected_loss(logp, adapter, [(r["prompt"], r["completion"]) for r in SFT])
        assert found[name]["loss"] == pytest.approx(losses[name], abs=1e-4)
        assert found[name]["perplexity"] == pytest.approx(math.exp(losses[name]), rel=1e-3)
        assert found[name]["tokens"] == tokens
        assert found[name]["accuracy"] is None
    assert abs(losses["base"] - losses["lora"]) > 0.1  # so that 1e-4 means something


def test_implicit_rewards_equal_the_formula(world, logp, tmp_path, capsys):
    """r(x, y) = β [log π(y|x) - log π_base(y|x)] in stock peft; a ranking has all its pairs; ties have none."""
    found = run(world, tmp_path, "pairs.jsonl", "ranked.jsonl")
    pairs = [(r["prompt"], r["chosen"], r["rejected"]) for r in PAIRS]
    one, two, three = RANKED[0]["completions"]
    ranked = [(RANKED[0]["prompt"], *pair) for pair in ((two, one), (one, three), (two, three))]
    leads = []
    for prompt, better, worse in pairs + ranked:
        rewards = [logp("lora", prompt, text)[0] - logp(None, prompt, text)[0] for text in (better, worse)]
        leads.append(BETA * (rewards[0] - rewards[1]))
    sources = {Path(name).name: own for name, own in found["lora"]["sources"].items()}
    for figures, own in (
        (found["lora"], leads),
        (sources["pairs.jsonl"], leads[:9]),
        (sources["ranked.jsonl"], leads[9:]),
    ):
        assert figures["margin"] == pytest.approx(sum(own) / len(own), abs=1e-4)
        assert figures["accuracy"] == sum(lead > 0 for lead in own) / len(own)
        assert figures["pairs"] == len(own)
    best = [(prompt, better) for prompt, better, _ in pairs] + [(RANKED[0]["prompt"], two)]
    assert found["lora"]["loss"] == pytest.approx(expected_loss(logp, "lora", best)[0], abs=1e-4)
    assert found["base"]["accuracy"] is None  # its reward is 0 by definition
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["loss", "perplexity", "accuracy", "margin", "tokens", "pairs"]
    assert len(table) == 1 + 2 * 3 and f"{found['lora']['loss']:.4f}" in table[4]


def test_strings_are_turns_where_the_option_says_so(world, tmp_path):
    """As the same rows written as messages; and an adapter that was trained on them needs no option."""
    chat = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in SFT
    ]
    write_jsonl(tmp_path / "chat.jsonl", chat)
    expected = run(world, tmp_path, tmp_path / "chat.jsonl")
    assert expected != run(world, tmp_path, "sft.jsonl")
    found = run(world, tmp_path, "sft.jsonl", options=("--adapter", "lora", "--data.prompt-format", "chat"))
    shutil.copytree(world / "lora", tmp_path / "lora")
    (tmp_path / "lora" / "lowalign.json").write_text('{"prompt_format": "chat"}')
    known = run(world, tmp_path, "sft.jsonl", options=("--adapter", str(tmp_path / "lora")))
    for figures in (found, known):
        assert [figures[name]["loss"] for name in figures] == [expected[name]["loss"] for name in expected]


def test_a_reward_run_is_measured_by_its_scores(world, tmp_path):
    """As `lowalign score` gives them."""
    out = tmp_path / "scores.jsonl"
    command = ["score", "--model", str(world / "model"), "--adapter", str(world / "reward"), "--out", str(out)]
    assert main([*command, "--data", str(world / "pairs.jsonl"), *FP32]) == 0
    scores = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    leads = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    found = run(world, tmp_path, "pairs.jsonl", options=("--adapter", "reward", "--adapter", "lora"))
    assert found["reward"]["accuracy"] == sum(lead > 0 for lead in leads) / 9
    assert found["reward"]["margin"] == pytest.approx(sum(leads) / 9, abs=1e-5)
    assert found["reward"]["loss"] is None and found["lora"]["loss"] is not None


def test_one_load_and_any_batch(world, tmp_path, monkeypatch):
    loads, real = [], Base.load.__func__
    monkeypatch.setattr(Base, "load", classmethod(lambda cls, *a, **k: loads.append(a) or real(cls, *a, **k)))
    adapters = ("--adapter", "lora", "--adapter", "policy")
    whole = run(world, tmp_path, "sft.jsonl", "pairs.jsonl", options=adapters)
    assert len(loads) == 1 and list(whole) == ["base", "lora", "policy"]
    small = run(world, tmp_path, "sft.jsonl", "pairs.jsonl", options=(*adapters, "--token-budget", "20"))
    for name, figures in whole.items():
        assert small[name]["loss"] == pytest.approx(figures["loss"], abs=1e-4)


def test_the_base_is_that_of_the_run(world, tmp_path):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "adapter").symlink_to(world / "lora")
    (run_folder / "recipe.yaml").write_text(f"model: {world / 'model'}\n")
    assert main(["eval", "--data", str(world / "sft.jsonl"), "--adapter", str(run_folder), *FP32]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "MODEL"], "eval takes either --data FILE… or --tasks NAME,NAME…"),
        (["--data", "sft.jsonl", "--tasks", "arc_easy", "--model", "MODEL"], "eval takes either --data FILE… or --tasks"),
        (["--data", "sft.jsonl"], "nothing to measure: give --adapter RUN, or --model M for the base alone"),
        (["--data", "sft.jsonl", "--model", "MODEL", "--fewshot", "2"], "are options of --tasks"),
        (["--data", "sft.jsonl", "--model", "MODEL", "--beta", "0"], "--beta is 0.0; it must be above 0"),
        (["--data", "gone.jsonl", "--model", "MODEL"], "gone.jsonl"),
        (["--data", "labels.jsonl", "--model", "MODEL"], "have a label and no second answer: eval compares answers"),
        (["--data", "sft.jsonl", "--model", "MODEL", "--adapter", "missing/a/b"], "missing/a/b is not a folder"),
        (["--data", "sft.jsonl", "--model", "MODEL", "--adapter", "model"], "is not an adapter folder"),
        (["--data", "sft.jsonl", "--adapter", "lora", "--model", "missing/a/b"], "missing/a/b is not a folder"),
        (["--data", "sft.jsonl", "--model", "MODEL", "--out", "no/where/x.json"], "there is no folder no/where"),
        (["--data", "sft.jsonl", "--model", "MODEL", "--data.limit", "0"], "--data.limit is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_message(options, message, world, capsys):
    options = [str(world / o.replace("MODEL", "model")) if (world / o.replace("MODEL", "model")).exists() else o for o in options]  # fmt: skip
    assert main(["eval", *options, *FP32]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_without_lm_eval_the_message_says_what_to_install(world, capsys, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "lowalign.commands.lm_eval_host", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--tasks", "arc_easy", "--model", str(world / "model")]) == 1
    assert "pip install lowalign[eval]" in capsys.readouterr().err


def test_stages_of_a_pipeline(world, tmp_path, monkeypatch):
    """eval and compare on the one base of `lowalign run`; a second run finds both finished."""
    loads, real = [], Base.load.__func__
    monkeypatch.setattr(Base, "load", classmethod(lambda cls, *a, **k: loads.append(a) or real(cls, *a, **k)))
    (tmp_path / "short.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    (tmp_path / "both.yaml").write_text(
        "verb: run\nstages:\n"
        f"  eval: {{data: {world / 'sft.jsonl'}, adapter: [{world / 'lora'}, {world / 'policy'}]}}\n"
        f"  compare: {{data: {world / 'sft.jsonl'}, a: {world / 'lora'}, b: base, judge: {tmp_path / 'short.py'}:short,"
        " sampling: {max_new_tokens: 3}}\n"
    )
    out = tmp_path / "out"
    command = ["run", str(tmp_path / "both.yaml"), "--model", str(world / "model"), "--out", str(out), *FP32]
    assert main(command) == 0
    assert len(loads) == 1
    figures = json.loads((out / "eval").read_text())["results"]
    assert list(figures) == ["base", str(world / "lora"), str(world / "policy")]
    assert figures["base"] == run(world, tmp_path, "sft.jsonl")["base"]
    stages = json.loads((out / "pipeline.json").read_text())["stages"]
    result = json.loads((out / "compare" / "result.json").read_text())
    assert stages["compare"]["figures"]["win_rate"] == result["win_rate"]
    before = (out / "eval").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "eval").stat().st_mtime_ns == before
