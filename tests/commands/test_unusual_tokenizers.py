"""Unusual tokenizers through rows, dpo and sampling: what is learned ends in the token that ends what is generated."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lowalign import Host
from lowalign.cli import main
from lowalign.config.sections import AdapterConfig, DataConfig, PreferenceConfig, Sampling, TrainConfig
from lowalign.config.training import DPOLossConfig
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.preferences import load_preferences
from lowalign.data.rendering.variants import SYSTEM_NOTE
from lowalign.durable import write_jsonl
from lowalign.methods.dpo import DPO
from lowalign.methods.sft import SFT
from lowalign.model.adapters.kinds import peft_config
from tests.commands.tiny_runs import FP32, load
from tests.data import made
from tests.tiny import tiny_model

SYSTEM = {"role": "system", "content": " Be brief. "}
QUESTION = {"role": "user", "content": "  What is it?\n"}
ANSWER = {"role": "assistant", "content": " A cat \n"}
OTHER = {"role": "assistant", "content": "No"}


@dataclass
class Kind:
    """A tokenizer; the answers " A cat \\n" and "No" as they are learned; the tokens at which sampling ends; config of the base."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    answer: str
    other: str
    ends: set[str]
    base: dict = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)


KINDS = {
    "pad is eos": Kind(
        lambda: made.chatml(pad_token="<|im_end|>"), " A cat \n<|im_end|>", "No<|im_end|>", {"<|im_end|>"},
        {"eos_token_id": None},
    ),
    "no eos, the template ends turns": Kind(
        lambda: made.bytes_tokenizer(["<|im_start|>", "<|im_end|>"], made.CHATML),
        " A cat \n<|im_end|>", "No<|im_end|>", {"<|im_end|>"}, {"eos_token_id": None, "pad_token_id": None},
    ),
    "several eos, contents stripped": Kind(
        made.llama3, "A cat<|eot_id|>", "No<|eot_id|>", {"<|eot_id|>", "<|eom_id|>"}, {"eos_token_id": [3, 4]}
    ),
    "no template": Kind(
        lambda: made.bytes_tokenizer(["<pad>", "</s>"], eos_token="</s>", pad_token="<pad>"),
        " A cat \n</s>", "No</s>", {"</s>"}, {"eos_token_id": 1},
    ),
    "no system turns, eos is not the end of turn": Kind(
        made.gemma, "A cat<end_of_turn>", "No<end_of_turn>", {"<end_of_turn>", "<eos>"}, {"eos_token_id": 1}, {SYSTEM_NOTE}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_rows_dpo_and_sampling_end_alike(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model = tiny_model(**kind.base)
    model.generation_config.eos_token_id = kind.base["eos_token_id"]
    model.save_pretrained(tmp_path / "model")
    kind.tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": [SYSTEM, QUESTION, ANSWER]}])
    write_jsonl(tmp_path / "dpo.jsonl", [{"prompt": [SYSTEM, QUESTION], "chosen": [ANSWER], "rejected": [OTHER]}])
    base = load(tmp_path / "model")
    tokenizer, chat = base.tokenizer, Chat(base.tokenizer)
    (row,) = load_examples([str(tmp_path / "sft.jsonl")], chat, DataConfig(cache=False)).examples
    (pair,) = load_preferences([str(tmp_path / "dpo.jsonl")], chat, PreferenceConfig(cache=False)).examples
    texts = [tokenizer.decode(ids) for ids in (row.completions[0], *pair.completions)]
    assert texts == [kind.answer, kind.answer, kind.other] and all(all(e.mask(0)) for e in (row, pair))
    assert row.prompt == pair.prompt == chat.prompt_ids([SYSTEM, QUESTION])
    assert set(chat.notes) == kind.notes and "Be brief." in tokenizer.decode(row.prompt)

    host = Host(base)
    host.add("policy", peft_config(AdapterConfig(r=2)))
    sft = SFT(host, [row], ("policy",), TrainConfig())
    loss, _ = sft.loss([row], sft.normalizers([row]))
    ids = torch.tensor([row.prompt + row.completions[0]])
    nll = -base.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :].mean()
    assert loss.item() == pytest.approx(nll.item(), rel=1e-4)
    dpo = DPO(host, [pair], ("policy",), (), DPOLossConfig(), TrainConfig())
    assert dpo.loss([pair], dpo.normalizers([pair]))[0].item() == pytest.approx(log(2), rel=1e-5)

    base.end_at(chat.end_of_turn)
    sampling = Sampling(max_new_tokens=60, temperature=20.0, top_p=1.0)  # nearly uniform
    with host.use():
        (group,) = host.generate([row.prompt], 30, sampling)
    ends = set(tokenizer.convert_tokens_to_ids(sorted(kind.ends)))
    assert set(base.eos_ids) == ends and {c.ids[-1] for c in group if c.stopped} == ends
    for completion in group:
        assert not ends & set(completion.ids[:-1])
        assert completion.stopped or len(completion.ids) == 60


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template and no end-of-sequence token to end a turn with: give a template"),
        (made.OPEN, "the tokenizer has no end-of-sequence token, and nothing else would end an answer: name the token"),
    ],
)
def test_nothing_ends_an_answer(template: str | None, message: str, tmp_path: Path, capsys) -> None:
    """Said before the base is loaded, which is not there."""
    made.bytes_tokenizer(["<s>"], template, bos_token="<s>").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny_model().config.to_dict()))
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": [QUESTION, ANSWER]}])
    write_jsonl(tmp_path / "dpo.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for verb, file in (("sft", "sft"), ("dpo", "dpo"), ("generate", "sft")):
        words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / f"{file}.jsonl"), *FP32]
        assert main([verb, *words, "--out", str(tmp_path / verb)]) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err


def test_plain_text_of_a_tokenizer_without_eos_is_refused(tmp_path: Path, capsys) -> None:
    """The template ends turns, but nothing ends a text."""
    KINDS["no eos, the template ends turns"].tokenizer().save_pretrained(tmp_path)
    write_jsonl(tmp_path / "text.jsonl", [{"prompt": "a", "completion": "b"}])
    assert main(["data", "check", str(tmp_path / "text.jsonl"), "--model", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "no end-of-sequence token" in err and "rows of messages" in err


def test_tokens_without_an_embedding_are_named(tmp_path: Path, capsys) -> None:
    """Tokens that were added to the tokenizer alone: an IndexError on the CPU, the end of the process on a card."""
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer = made.bytes_tokenizer(["</s>"], made.CHATML, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    number = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert number >= 300
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": [QUESTION, ANSWER]}])
    data, model = str(tmp_path / "sft.jsonl"), str(tmp_path / "model")
    for verb, place in (("sft", f"{data}:1"), ("eval", f"{data}:1"), ("generate", "a prompt")):
        out = () if verb == "eval" else ("--out", str(tmp_path / verb))
        assert main([verb, "--model", model, "--data", data, *out, *FP32]) == 1
        err = capsys.readouterr().err
        assert f"{place}: the token <|im_" in err and "has no embedding: the base has 300" in err
        assert "Traceback" not in err
