"""`lowalign eval --tasks`: tasks made of local rows, under the Host and under lm-eval's own backend for transformers."""

import json
from functools import partial
from pathlib import Path

import pytest
import transformers

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks import lm_eval_host as benchmark
from lowalign import Host
from lowalign.cli import main
from lowalign.commands import lm_eval_host
from lowalign.commands.lm_eval_host import HostLM
from lowalign.data.chat import Chat
from lowalign.durable import write_jsonl
from tests.commands.tiny_runs import FP32, load, make
from tests.tiny import tiny_folder

CHOICE = """
task: CHOICE
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: ROLLING
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
UNTIL = """
task: UNTIL
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TASKS = ["lowalign_choice", "lowalign_rolling", "lowalign_until"]
LONG = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? " * 30
)  # more than the 512 positions


@pytest.fixture(autouse=True)
def only_local_tasks(monkeypatch):
    """To read the index of lm-eval's own tasks takes 8 seconds."""
    monkeypatch.setattr(lm_eval_host, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make(tmp_path_factory.mktemp("tasks"))
    words = ["fox", "dog", "the capital", "Paris is quick", "fox jumps", "brown"]
    rows = [
        {"question": f"Which of {i} {'is it? ' * i}", "choices": [words[i % 6], words[(i + 1) % 6], words[(i + 3) % 6]], "answer": i % 3}
        for i in range(12)
    ]  # fmt: skip
    write_jsonl(folder / "choice.jsonl", rows)
    write_jsonl(folder / "texts.jsonl", [{"text": "The quick fox."}, {"text": LONG}, {"text": "What is Paris?"}])
    (folder / "tasks").mkdir()
    for name, text in zip(TASKS, (CHOICE, ROLLING, UNTIL), strict=True):
        kind = name.removeprefix("lowalign_")
        (folder / "tasks" / f"{name}.yaml").write_text(text.replace(kind.upper(), name).replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def theirs(world) -> HFLM:
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model").float().eval()
    return HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(world / "model"), batch_size=4)


@pytest.fixture(scope="module")
def ours(world) -> HostLM:
    host = Host(load(world / "model"))
    return HostLM(host, Chat(host.base.tokenizer), 2048)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_every_task_has_the_same_numbers(world, theirs, tmp_path, capsys):
    out = tmp_path / "figures.json"
    options = ["--tasks", ",".join(TASKS), "--task-folder", str(world / "tasks"), "--out", str(out)]
    adapter = ["--adapter", str(world / "policy")]
    assert main(["eval", *options, *adapter, "--model", str(world / "model"), *FP32]) == 0
    found = json.loads(out.read_text())["results"]
    manager = TaskManager(include_path=str(world / "tasks"), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=TASKS, task_manager=manager, log_samples=False)["results"]
    compared = 0
    for task in TASKS:
        numbers = {k: v for k, v in expected[task].items() if isinstance(v, float)}
        for key, value in numbers.items():
            assert found["base"][task][key] == pytest.approx(value, rel=1e-4), (task, key)
            compared += "stderr" not in key
    assert compared == 5
    assert found[str(world / "policy")] != found["base"]  # the adapter acts
    assert "lowalign_choice" in capsys.readouterr().out


def test_log_likelihoods_equal_those_of_the_stock_backend(theirs, ours):
    """Shared contexts, no context, a context that ends with a space, one beyond the model's positions, and repeats."""
    pairs = [("The quick", " brown fox"), ("The quick", " lazy dog"), ("The quick", " brown fox"), ("", "Paris")]
    pairs += [("What is ", "the capital?"), (LONG, " fox"), (LONG, " What?"), ("The quick", " brown")]
    greedy = theirs.generate_until(requests("generate_until", ("The quick", {"until": [], "max_gen_toks": 1})))[0]
    pairs.append(("The quick", greedy))
    mine, stock = (lm.loglikelihood(requests("loglikelihood", *pairs)) for lm in (ours, theirs))
    assert [logp for logp, _ in mine] == pytest.approx([logp for logp, _ in stock], abs=1e-3)
    assert [same for _, same in mine] == [same for _, same in stock]
    texts = [(LONG,), ("Paris",), ("",)]
    mine, stock = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in (ours, theirs))
    assert mine == pytest.approx(stock, rel=1e-4)


@pytest.mark.parametrize("kind", ["gemma2", "bloom"])
def test_other_architectures(kind, tmp_path):
    """With soft caps and windows; and with attention that cannot be packed."""
    tiny_folder(tmp_path, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    stock = HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path))
    host = Host(load(tmp_path))
    mine = HostLM(host, Chat(host.base.tokenizer), 2048)
    pairs = requests("loglikelihood", ("The quick brown fox", " jumps over"), ("The quick brown fox", " lazy dog"))
    found, expected = (lm.loglikelihood(pairs, disable_tqdm=True) for lm in (mine, stock))
    assert [logp for logp, _ in found] == pytest.approx([logp for logp, _ in expected], abs=1e-3)
    until = requests("generate_until", ("The quick", {"until": ["o"], "max_gen_toks": 6}))
    assert mine.generate_until(until) == stock.generate_until(until)


def test_a_context_is_computed_once(ours, monkeypatch):
    packed, real = [], Host.states
    monkeypatch.setattr(Host, "states", lambda host, batch: packed.extend(batch) or real(host, batch))
    ours.loglikelihood(requests("loglikelihood", *(("The quick brown", f" fox {i}") for i in range(4))))
    assert [len(example.completions) for example in packed] == [4]


def test_the_benchmark_runs(capsys):
    benchmark.main(2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["lowalign", "HFLM", "largest"]
    assert float(lines[2].split()[-1]) < 1e-3


def test_generation_ends_at_a_stop_string(theirs, ours, monkeypatch):
    """With the same texts, and without the tokens after it: it is found while tokens are drawn."""
    contexts = [f"What is {i} {'the capital ' * i}" for i in range(8)]
    for options in ({"until": ["e"], "max_gen_toks": 20}, {"until": ["qu", "\n"], "max_gen_toks": 9}, {"until": []}):
        drawn, real = [], Host.generate
        with monkeypatch.context() as patch:
            patch.setattr(Host, "generate", lambda *a, **k: drawn.extend(real(*a, **k)) or drawn)  # noqa: B023
            mine = ours.generate_until(requests("generate_until", *((c, options) for c in contexts)))
        assert mine == theirs.generate_until(requests("generate_until", *((c, options) for c in contexts)))
        for (completion,) in drawn:
            text = ours.tokenizer.decode(completion.ids[:-1])
            assert not any(stop in text for stop in options["until"])


def test_a_chat_template_is_that_of_the_adapter(world):
    host = Host(load(world / "model"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip
    lm = HostLM(host, Chat(host.base.tokenizer, template), 2048)
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<assistant>"
    assert lm.chat_template(True) == template and host.base.tokenizer.chat_template != template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "no_such_task_at_all"], "lm-eval has no task no_such_task_at_all"),
        (["--tasks", "lowalign_choice", "--task-folder", "nowhere"], "--task-folder nowhere is not a folder"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "lowalign_choice", "--task-folder", "TASKS", "--adapter", "REWARD"], "is a reward model: it scores answers and cannot write them"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_message(options, message, world, capsys):
    options = [{"TASKS": str(world / "tasks"), "REWARD": str(world / "reward")}.get(o, o) for o in options]
    assert main(["eval", *options, "--model", str(world / "model"), *FP32]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
