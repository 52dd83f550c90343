"""The format of prompts from verb to verb: it is stored with an adapter, and another one is refused."""

import json

import pytest
from transformers import GenerationConfig

from lowalign.cli import main
from tests.tiny import tiny_folder

QUESTIONS = ["Who jumps?", "What is lazy?", "Where is Paris?", "Is it quick?"]
STEPS = ("--train.steps", "1", "--train.batch-size", "2", "--data.no-cache", "--adapter.r", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, rows of both formats, and a run of sft and of reward on each."""
    folder = tmp_path_factory.mktemp("world")
    tiny_folder(folder / "model", "llama")
    GenerationConfig(eos_token_id=list(range(2, 60))).save_pretrained(folder / "model")
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = {
        "sft-text": [{"prompt": q, "completion": "A fox."} for q in QUESTIONS],
        "sft-chat": [{"messages": turn("user", q) + turn("assistant", "A fox.")} for q in QUESTIONS],
        "reward-text": [{"prompt": q, "chosen": "A fox.", "rejected": "A dog."} for q in QUESTIONS],
        "reward-chat": [{"prompt": turn("user", q), "chosen": "A fox.", "rejected": "A dog."} for q in QUESTIONS],
        "prompts": [{"prompt": q} for q in QUESTIONS],
        "documents": [{"text": "The quick brown fox."}] * 2,
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in [name for name in rows if "-" in name]:
        assert main([*run(folder, name.partition("-")[0], f"{name}.jsonl"), "--out", f"{folder}/{name}"]) == 0
    return folder


def run(world, verb: str, data: str) -> list[str]:
    return [verb, "--model", f"{world}/model", "--data", f"{world}/{data}", *STEPS]


def ppo(world, tmp_path, *more: str) -> list[str]:
    return [
        *run(world, "ppo", "prompts.jsonl"), "--out", f"{tmp_path}/ppo", "--rollout.prompts", "2", "--rollout.samples", "2",
        "--sampling.max-new-tokens", "6", "--ppo.epochs", "1", "--value.adapter.r", "2", "--rollout.missing-eos", "keep", *more,
    ]  # fmt: skip


def refused(arguments, capfd) -> str:
    capfd.readouterr()
    assert main(arguments) == 1
    stderr = capfd.readouterr().err
    assert "Traceback" not in stderr
    return stderr[stderr.index("lowalign: ") :].strip()


def meta(run_folder) -> dict:
    return json.loads((run_folder / "adapter" / "lowalign.json").read_text())


def test_an_adapter_says_what_it_was_trained_on(world, tmp_path):
    assert {name: meta(world / name)["prompt_format"] for name in ("sft-text", "sft-chat", "reward-text", "reward-chat")} == {
        "sft-text": "text", "sft-chat": "chat", "reward-text": "text", "reward-chat": "chat",
    }  # fmt: skip
    out = ["--out", f"{tmp_path}/a", "--data.prompt-format", "chat"]
    assert main([*run(world, "sft", "sft-text.jsonl"), *out]) == 0
    assert meta(tmp_path / "a")["prompt_format"] == "chat"
    both = [*run(world, "sft", "sft-text.jsonl"), "--data", f"{world}/sft-text.jsonl", f"{world}/sft-chat.jsonl"]
    assert main([*both, "--out", f"{tmp_path}/b"]) == 0
    assert meta(tmp_path / "b")["prompt_format"] == "mixed"
    assert main([*run(world, "sft", "documents.jsonl"), "--out", f"{tmp_path}/c", "--init", f"{world}/sft-chat"]) == 0
    assert meta(tmp_path / "c")["prompt_format"] == "chat"  # documents have no prompts


def test_ppo_does_not_change_the_format_of_prompts(world, tmp_path, capfd):
    """String prompts became turns of the user for adapters that were trained on plain text, without a word."""
    on_text = ppo(world, tmp_path, "--init", f"{world}/sft-text", "--reward", f"{world}/reward-text")
    assert main(on_text) == 0
    assert meta(tmp_path / "ppo")["prompt_format"] == "text"
    sample = json.loads((tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] in QUESTIONS
    on_chat = ppo(world, tmp_path / "b", "--init", f"{world}/sft-chat", "--reward", f"{world}/reward-chat")
    assert refused(on_chat, capfd) == (
        f"lowalign: the reward run {world}/reward-chat was trained on turns of a chat, and these prompts are plain text. "
        "A string is plain text; --data.prompt-format chat makes it a turn"
    )
    assert main([*on_chat, "--data.prompt-format", "chat"]) == 0
    assert meta(tmp_path / "b" / "ppo")["prompt_format"] == "chat"
    sample = json.loads((tmp_path / "b" / "ppo" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"][0]["role"] == "user"


@pytest.mark.parametrize(
    ("verb", "data", "init", "says"),
    [
        ("sft", "sft-text.jsonl", "sft-chat", "was trained on turns of a chat, and these prompts are plain text"),
        ("dpo", "reward-text.jsonl", "sft-chat", "was trained on turns of a chat, and these prompts are plain text"),
        ("reward", "reward-chat.jsonl", "sft-text", "was trained on plain text, and these prompts are turns of a chat"),
    ],
)
def test_an_init_of_the_other_format_is_refused_unless_the_option_is_given(
    world, tmp_path, capfd, verb, data, init, says
):
    command = [*run(world, verb, data), "--out", f"{tmp_path}/a", "--init", f"{world}/{init}"]
    message = refused(command, capfd)
    assert message.startswith(f"lowalign: --init {world}/{init} {says}. ")
    assert message.endswith(". --data.prompt-format text or chat accepts both formats")
    if verb == "sft":
        assert main([*command, "--data.prompt-format", "text"]) == 0


def test_best_of_n_and_score_refuse_the_other_format(world, tmp_path, capfd):
    best = [
        "best-of-n", "--model", f"{world}/model", "--data", f"{world}/prompts.jsonl", "--out", f"{tmp_path}/best", "--n", "2",
        "--sampling.max-new-tokens", "6", "--unfinished", "keep",
    ]  # fmt: skip
    chat = [*best, "--adapter", f"{world}/sft-chat", "--reward", f"{world}/reward-chat"]
    assert f"--adapter {world}/sft-chat was trained on turns of a chat" in refused(chat, capfd)
    text = [*best, "--adapter", f"{world}/sft-text", "--reward", f"{world}/reward-chat"]
    assert f"the reward run {world}/reward-chat was trained on turns of a chat" in refused(text, capfd)
    assert main([*chat, "--data.prompt-format", "chat"]) == 0
    row = json.loads((tmp_path / "best" / "candidates.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == [{"role": "user", "content": QUESTIONS[0]}]
    score = [
        "score",
        "--model",
        f"{world}/model",
        "--adapter",
        f"{world}/reward-chat",
        "--data",
        f"{world}/reward-text.jsonl",
    ]
    assert "--data.prompt-format chat makes it a turn" in refused(score, capfd)
    assert main([*score, "--data.prompt-format", "chat"]) == 0
    judge = ["judge", "--model", f"{world}/model", "--reward", f"{world}/reward-chat", "--out", f"{tmp_path}/judged"]
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "Who?", "completions": ["A fox.", "A dog."]}) + "\n")
    judge += ["--data", f"{tmp_path}/answers.jsonl"]
    assert "was trained on turns of a chat, and these prompts are plain text" in refused(judge, capfd)
    assert main([*judge, "--data.prompt-format", "chat"]) == 0


def test_generate_asks_as_its_adapter_was_trained(world, tmp_path, capfd):
    for name, prompt in (("sft-text", "Who jumps?"), ("sft-chat", [{"role": "user", "content": "Who jumps?"}])):
        command = ["generate", "--model", f"{world}/model", "--adapter", f"{world}/{name}", "--prompt", "Who jumps?"]
        assert main([*command, "--sampling.max-new-tokens", "4", "--out", f"{tmp_path}/{name}"]) == 0
        assert (
            json.loads((tmp_path / name).read_text())["prompt"] == prompt
        )  # a string is plain text when it is read again
    capfd.readouterr()
    assert (
        main(["generate", "--model", f"{world}/model", "--prompt", "Who jumps?", "--sampling.max-new-tokens", "4"]) == 0
    )
    captured = capfd.readouterr()
    assert json.loads(captured.out)["prompt"] == "Who jumps?"
    assert (
        "prompts that are strings are plain text, without the chat template; --data.prompt-format chat" in captured.err
    )
