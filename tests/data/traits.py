"""Small chat templates, each with one trait of a published one."""

from transformers import PreTrainedTokenizerFast

from tests.data import made

TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
END = "{{ '<|im_end|>\\n' }}"
OPENED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chatml(body: str, opened: str = OPENED) -> str:
    """A ChatML template with tools. body: what it writes of a message m between header and end."""
    return f"{TOOLS}{{% for m in messages %}}{TURN}{body}{END}{{% endfor %}}{opened}"


# As gpt-oss: one call a turn; the text beside it only where no answer follows; another end for the last turn.
ONE_CALL = (
    f"{TOOLS}{{% for m in messages %}}{TURN}{{% if m.tool_calls %}}"
    "{% set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | list %}"
    "{% if m.content and not later %}{{ '[analysis]' + m.content }}{% endif %}"
    "{{ (m.tool_calls[0].function | tojson) + '<|im_end|>\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + OPENED
)
# As SmolLM3: only a first system turn is written; a default one names <think>.
ONE_SYSTEM = (
    "{{ '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'Think in <think> </think>.')"
    " + '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    + TURN
    + "{{ m.content }}"
    + END
    + "{% endif %}{% endfor %}"
    + OPENED
)
# As Mistral v0.3 and Nemo: the system text stands in the last user turn, if that is the last turn.
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if system and loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# As R1 and QwQ: thoughts are opened in the generation prompt and taken out of what was said.
OPENS_THOUGHTS = chatml(
    "{{ m.content.split('</think>')[-1] | trim }}" + CALLS,
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
)
# As GLM-4.7: nothing ends a turn but the next one; thoughts are opened, or closed at once with enable_thinking=false.
NEXT_ENDS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '</think>' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|observation|>{{ m.content }}{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"
)
# As functionary (Python's repr of a dict) and DeepSeek-V3 (an error for a dict).
TEXT_ARGUMENTS = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}={{ c.function.arguments }}</tool_call>"
    "{% endfor %}"
)
ADDED_ARGUMENTS = TEXT_ARGUMENTS.replace("={{ c.function.arguments }}", "{{ '=' + c.function.arguments }}")
# As Mistral's: ids of nine characters.
NINE = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    "<tool_call>{{ c.id + (c.function | tojson) }}</tool_call>{% endfor %}"
)
# As Hermes-3: one more newline after a result when an answer follows.
NEWLINE = chatml("{{ m.content }}{% if m.role == 'tool' and not loop.last %}{{ '\\n' }}{% endif %}" + CALLS)
# As trl's training templates: what the assistant writes is tagged, end and newline included.
TAGGED = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + OPENED
)


def next_ends() -> PreTrainedTokenizerFast:
    """The tokenizer of NEXT_ENDS."""
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"]
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    return made.bytes_tokenizer(special, NEXT_ENDS, plain=tags, eos_token="<|endoftext|>")


def system_last() -> PreTrainedTokenizerFast:
    """The tokenizer of SYSTEM_LAST."""
    return made.bytes_tokenizer(["<s>", "</s>", "[INST]", "[/INST]"], SYSTEM_LAST, bos_token="<s>", eos_token="</s>")
