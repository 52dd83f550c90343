"""Tokenizers and chat templates made for the tests: the same kinds as the published ones, small enough to read."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["user assistant system tool the cat sat on the mat and said hello to a dog", "What is in the box? Nothing."]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen2.5: tools in the system message, calls as <tool_call>, results as a user turn.
CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif not (tools and loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3.1: bos in the template, calls end in another token than answers, one call at a time.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role)"
    " + '<|end_header_id|>\\n\\n' }}"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('This model only supports single tool-calls"
    " at once!') }}{% endif %}{{ m.tool_calls[0].function | tojson + '<|eom_id|>' }}"
    "{% else %}{{ (tools | tojson + '\\n' if tools and loop.first else '') + m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# As Llama 2 and Mistral: no generation prompt, plain-text markers, system inside the first user turn, strict turns.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As Gemma: no system role, the assistant is called model, strict turns.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# As Qwen3: the thoughts of earlier turns are taken out.
QWEN3 = (
    "{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Phi-3: eos follows the last turn, and only that one.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Nothing ends a turn.
OPEN = (
    "{% for m in messages %}{{ '### ' + m.role + ':\\n' + m.content + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)


def bytes_tokenizer(
    special: list[str], template: str | None = None, bos_first: bool = False, plain: tuple[str, ...] = (), **named: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it. plain: added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if bos_first:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    made.chat_template = template
    return made


def sentencepiece_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Characters with byte fall-back and a space put before every text, as Llama 2's."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    vocabulary += [chr(i) for i in range(33, 127)] + ["▁t", "▁th", "▁the", "▁H", "▁A", "th"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "H"), ("▁", "A"), ("t", "h")]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made


def chatml(template: str | None = CHATML, **more: str) -> PreTrainedTokenizerFast:
    """As Qwen's: no bos, a turn ends in <|im_end|>, <think> and the tool tags are added but not special."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"} | more
    return bytes_tokenizer(special, template, plain=("<think>", "</think>", "<tool_call>", "</tool_call>"), **named)


def llama3() -> PreTrainedTokenizerFast:
    """As Llama 3's: a bos that the tokenizer puts in front too."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    return bytes_tokenizer(special, LLAMA3, bos_first=True, bos_token=special[0], eos_token="<|eot_id|>")


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma's: eos is not what ends a turn."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    return bytes_tokenizer(special, GEMMA, bos_first=True, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def phi3() -> PreTrainedTokenizerFast:
    """As Phi-3's."""
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    return bytes_tokenizer(special, PHI3, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


FOUR = {"chatml": chatml, "llama3": llama3, "llama2": lambda: sentencepiece_tokenizer(LLAMA2), "gemma": gemma}


def weather_call(city: str) -> dict:
    """One call of `weather`, as OpenAI writes it."""
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"id": "call_1", "type": "function", "function": function}


WEATHER = {"name": "weather", "description": "Weather of a city.", "parameters": {"type": "object", "properties": {}}}
