"""The Modelfile's Go template against the Jinja template, by a small reading of Go's template language."""

import re

import pytest

from lowalign.export.ollama import modelfile
from tests.tiny import tiny_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
VIRTUAL = "<|virtual_0|><|virtual_1|>" + LLAMA3
SYSTEM_IN_USER = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last %}{{ s }}{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m['content'] }}{% endfor %}"


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def run_go(template: str, messages: list[dict]) -> str:
    """The commands that a Modelfile of ours has: if not .System, range .Messages, if/else if eq .Role, .Content."""
    system = any(m["role"] == "system" for m in messages)
    default, turns, generation = re.fullmatch(
        r"(?:\{\{ if not \.System \}\}(.*?)\{\{ end \}\})?\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)",
        template,
        re.S,
    ).groups()
    branches = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', turns, re.S))
    text = "".join(branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)
    return ("" if system else default or "") + text + generation


@pytest.mark.parametrize("template", [CHATML, LLAMA3, VIRTUAL], ids=["chatml", "llama3", "virtual tokens"])
def test_it_renders_what_the_chat_template_renders(template):
    tokenizer = tokenizer_with(template)
    text = modelfile(tokenizer, [2, 0])
    go = re.search(r'TEMPLATE """(.*)"""', text, re.S)[1]
    turns = [
        {"role": r, "content": f"{r} {i}\nwords"} for i, r in enumerate(["system", *["user", "assistant"] * 3, "user"])
    ]
    for messages in (turns, turns[1:], turns[:2], turns[1:2]):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run_go(go, messages) == expected
    assert text.startswith("FROM .\n") and text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<pad>"\n')


def test_bos_is_left_to_ollama_where_the_tokenizer_adds_it():
    tokenizer = tokenizer_with(LLAMA3)
    tokenizer.add_bos_token = True
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert "<s>" not in modelfile(tokenizer, [2]).split("PARAMETER")[0]


@pytest.mark.parametrize("template", [SYSTEM_IN_USER, NO_SYSTEM, CHATML.replace("assistant\n", '"""')])
def test_a_template_that_does_more_has_none(template):
    assert modelfile(tokenizer_with(template), [2]) is None
