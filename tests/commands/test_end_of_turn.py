"""Sampling in `lowalign ppo` and `lowalign best-of-n` ends at the template's end of turn, which here is not eos."""

import json

import pytest

from lowalign.cli import main
from tests.tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARD = """
import json, pathlib

def f(prompts, completions, stopped, completion_ids, **_):
    with pathlib.Path(__file__).with_name("seen.jsonl").open("a") as file:
        file.writelines(json.dumps(pair) + "\\n" for pair in zip(completion_ids, stopped))
    return [0.0 for _ in completions]
"""
OPTIONS = {
    "ppo": (
        "--sampling.max-new-tokens", "32", "--rollout.prompts", "8", "--rollout.samples", "6", "--train.steps", "1",
        "--train.batch-size", "8", "--rollout.missing-eos", "keep", "--ppo.advantage", "group", "--adapter.r", "2",
    ),
    "best-of-n": ("--sampling.max-new-tokens", "32", "--n", "6", "--unfinished", "keep"),
}  # fmt: skip


@pytest.mark.parametrize("verb", OPTIONS)
def test_a_completion_ends_at_the_end_of_turn(verb, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"Where is {name}?"}]} for name in "ABCDEFGH"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "f.py").write_text(REWARD)
    command = [
        verb, "--model", f"{tmp_path}/model", "--data", f"{tmp_path}/rows.jsonl", "--reward", f"{tmp_path}/f.py:f",
        "--out", f"{tmp_path}/run", "--base.quantization", "none", "--base.dtype", "float32", "--base.device", "cpu",
        *OPTIONS[verb],
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr().err
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    assert len(seen) == 48 and end != eos
    assert any(ids[-1] == end for ids, _ in seen)
    for ids, stopped in seen:
        assert not {end, eos} & set(ids[:-1])
        assert stopped == (ids[-1] in (end, eos)) and (stopped or len(ids) == 32)
