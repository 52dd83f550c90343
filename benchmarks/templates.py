"""What lowalign makes of published chat templates: 200 conversations for each, a sentinel in every text of every message.

    python benchmarks/templates.py [FOLDER …] [--rows N] [--list]

reads the *.jinja files of the folders; without any, those that trl publishes (`pip install lowalign[bench]`). The tokenizer
is byte-level, with the tokens that the template names. Prints one line of a Markdown table for each template:

equal      rows that are one example, whose text is the beginning of what apply_chat_template gives
turns      rows with an example for each turn, whose prompts are what apply_chat_template gives with the generation prompt
other      rows rendered otherwise: the notes say how
dropped    rows left out, with the reason
silent     rows that lack a sentinel which neither a note nor a reason names, or that learn what they should not: must be 0
"""

import argparse
import importlib.util
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lowalign.data.chat import Chat
from lowalign.data.pack import Example
from lowalign.data.rendering.template import CHATML, DATE
from lowalign.data.rows.rewrite import with_call_form, with_short_ids
from lowalign.data.rows.turns import Message, Tools, is_supervised, read_tools, read_turns
from lowalign.data.sources.row import RowError
from lowalign.errors import UserError

SPECIAL = re.compile(
    r"<\|[^|<>\s'\"{}]+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|\[/?(?:INST|TOOL_[A-Z]+|AVAILABLE_TOOLS|SYSTEM_PROMPT|ARGS|CALL_ID|THINK"
    r"|gMASK)\]|</?s>|<sop>|<(?:start|end)_of_turn>|<[be]os>|<end_of_utterance>|\]~b\]|\[e~\[|\]~!b\["
)
PLAIN = re.compile(r"</?(?:[a-z]+:)?(?:think|tool_call|tool_calls|tools|tool_response|arg_key|arg_value)>")
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|return|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
    "[e~[", "<|end_of_text|>", "<|end|>", "</s>", "<|endoftext|>",
)  # fmt: skip


def tokenizer_for(template: str, tool_use: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the tokens that the template names. tool_use: it is the template for rows with tools only."""
    special = sorted({*SPECIAL.findall(template), "<unk>", *(("<|im_start|>", "<|im_end|>") if tool_use else ())})
    eos = next((end for end in ENDS if end in special and "eos_token" not in template), "</s>")
    bos = next((t for t in ("<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "<s>") if t in special), "<s>")
    special = sorted({*special, eos, bos})
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    plain = sorted({*PLAIN.findall(template)})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, unk_token="<unk>")
    made.chat_template = {"default": CHATML % '"<|im_end|>"', "tool_use": template} if tool_use else template
    return made


class Conversations:
    """Random conversations, with a sentinel in each text, thought, call and result."""

    def __init__(self, seed: int):
        self.random, self.count = random.Random(seed), 0

    def text(self) -> str:
        """A text with a sentinel, sometimes of several lines, or with spaces around it."""
        self.count += 1
        body = self.random.choice(["{}", "{} ü.", "A line.\n\n{} and more", "  {} ", "1. {}\n", '"{}" \\n'])
        return body.format(f"zq{self.count}qz")

    def __next__(self) -> tuple[list[Message], Tools]:
        pick, text = self.random.choice, self.text
        kind = pick(["plain"] * 4 + ["thoughts", "tags", "tools", "tools", "beside", "two calls", "systems", "opening"])
        turns = [{"role": "system", "content": text()}] if pick([True, False]) or kind == "systems" else []
        turns += [{"role": "assistant", "content": text()}] if kind == "opening" else []
        for number in range(pick([1, 1, 2, 3])):
            turns.append({"role": "user", "content": text()})
            if kind in ("tools", "beside", "two calls"):
                turns += self._calls(kind)
                if pick([True, True, False]):
                    turns.append({"role": "assistant", "content": text()})
            else:
                answer = {"role": "assistant", "content": text()}
                if kind == "thoughts":
                    answer["reasoning_content"] = text()
                elif kind == "tags":
                    answer["content"] = f"<think>\n{text().strip()}\n</think>\n\n{answer['content']}"
                turns.append(answer)
            if kind == "systems" and number == 0:
                turns.append({"role": "system", "content": text()})
        if turns[-1]["role"] == "system":
            turns.pop()
        tools = [{"name": "find", "description": text(), "parameters": {"type": "object", "properties": {}}}]
        with_tools = kind in ("tools", "beside", "two calls")
        return read_turns(turns, "messages"), read_tools(tools) if with_tools else None

    def _calls(self, kind: str) -> list[Message]:
        count = 2 if kind == "two calls" else 1
        calls, results = [], []
        for _ in range(count):
            call_id = f"call_{self.count}"
            function = {"name": "find", "arguments": {"place": self.text().strip(), "count": 3}}
            calls.append({"id": call_id, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": call_id, "content": self.text()})
        content = self.text() if kind == "beside" else None
        return [{"role": "assistant", "content": content, "tool_calls": calls}, *results]


def sentinels(value: object) -> set[str]:
    """The sentinels in the texts of a message or of all tools."""
    return set(re.findall(r"zq\d+qz", repr(value)))


def outcome(chat: Chat, messages: list[Message], tools: Tools) -> tuple[str, list[str]]:
    """-> the column of the table for one conversation, and its notes or reasons."""
    chat.notes.clear()
    try:
        examples = chat.example(messages, tools)
    except UserError as error:
        return ("silent" if isinstance(error, RowError) else "dropped"), [str(error)]
    notes = list(chat.notes)
    if problem := silent(chat, messages, tools, examples, notes):
        return "silent", [problem, *notes]
    texts = [whole_text(chat, example) for example in examples]
    forms = [(text, null) for null in (False, True) for text in (False, True)]
    written = [with_call_form(m, *form) for m in (messages, with_short_ids(messages)) for form in forms]
    if len(texts) == 1 and any(stock(chat, form, tools).startswith(texts[0]) for form in written):
        return "equal", notes
    last = [i for i, m in enumerate(messages) if is_supervised(m) and i]
    prompts = [stock(chat, form[:i], tools, True) for i in last for form in written]
    same = all(decoded(chat, example.prompt) in prompts for example in examples)
    return "turns" if same else "other", notes


def stock(chat: Chat, messages: list[Message], tools: Tools, generation: bool = False) -> str:
    """What transformers gives for the conversation; "" when the template refuses it."""
    tokenizer = chat.tokenizer
    variables = {**tokenizer.special_tokens_map, "date_string": DATE, "add_generation_prompt": generation}
    try:
        if all(m["content"] is not None for m in messages):
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables)
        # apply_chat_template removes a content of null, and the template is then without it.
        template = tokenizer.get_chat_template(None, tools)
        return render_jinja_template([messages], tools, chat_template=template, **variables)[0][0]
    except Exception:  # a template is a program: it can fail in any way
        return ""


def silent(chat: Chat, messages: list[Message], tools: Tools, examples: list[Example], notes: list[str]) -> str:
    """What is wrong with the examples of a conversation and said nowhere; "" if nothing is."""
    opening = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    learned: set[str] = set()
    context: set[str] = sentinels(tools)
    end = max(i for i, m in enumerate(messages) if is_supervised(m)) + 1
    for i, message in enumerate(messages[:end]):
        (learned if is_supervised(message) and i >= opening else context).update(sentinels(message))
    spans = [span for example in examples for span in supervised_spans(chat, example)]
    found = sentinels("".join(spans))
    if found & context:
        return f"learns {sorted(found & context)}"
    everywhere = sentinels([whole_text(chat, example) for example in examples])
    left_out = any(note.startswith("the chat template leaves out") for note in notes) or "left out" in "".join(notes)
    if learned - found and not left_out:
        return f"does not learn {sorted(learned - found)}"
    if context - everywhere and not left_out:
        return f"lacks {sorted(context - everywhere)}"
    header = next(
        (t for t in ("<|im_start|>", "<|start_header_id|>", "<|user|>\n", "[INST]") if t in chat.template), "zqqz"
    )
    if any(header in span for span in spans):
        return f"learns a header: {spans}"
    ends = {chat.tokenizer.decode([i]) for i in chat.end_ids}
    if any(not any(span.endswith(end) for end in ends) for span in spans):
        return f"a turn without an end: {spans[-1][-30:]!r}"
    return ""


def decoded(chat: Chat, ids: list[int]) -> str:
    """The text of the ids, as it was."""
    return chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def whole_text(chat: Chat, example: Example) -> str:
    """The text of prompt and completion, without an end of sequence that the template does not write."""
    return decoded(chat, example.prompt + example.completions[0])


def supervised_spans(chat: Chat, example: Example) -> list[str]:
    """The supervised stretches, as text."""
    spans: list[list[int]] = []
    before = False
    for i, supervised in zip(example.completions[0], example.mask(0), strict=True):
        if supervised and not before:
            spans.append([])
        if supervised:
            spans[-1].append(i)
        before = supervised
    return [decoded(chat, span) for span in spans]


def row(path: Path, rows: int, listed: str | None) -> str:
    """The line of the table for one template."""
    template, conversations = path.read_text(encoding="utf-8"), Conversations(0)
    try:
        chat = Chat(tokenizer_for(template, "tool_use" in path.stem))
    except UserError as error:
        return f"| {path.stem} | | | | | | {error} |"
    counts, reasons = Counter(), Counter()
    for _ in range(rows):
        messages, tools = next(conversations)
        column, said = outcome(chat, messages, tools)
        counts[column] += 1
        reasons.update((column, text) for text in said)
        if column == listed:
            print(path.stem, said, messages, sep="\n  ")
    words = [f"{count} {column}: {shortened(text)}" for (column, text), count in reasons.most_common(6)]
    cells = [str(counts[name]) for name in ("equal", "turns", "other", "dropped", "silent")]
    return f"| {path.stem} | {' | '.join(cells)} | {'; '.join(words)} |"


def shortened(text: str) -> str:
    """The first words of a note or reason."""
    text = re.sub(r"zq\d+qz", "…", text.replace("the chat template ", "")).replace("|", "\\|")
    return text.split("; use another")[0][:90]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--list", help="print the rows of this column")
    options = parser.parse_args()
    folders = options.folders or [Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"]
    print("| template | equal | turns | other | dropped | silent | notes and reasons |")
    print("|---|---|---|---|---|---|---|")
    for folder in folders:
        for path in sorted(folder.glob("*.jinja")):
            print(row(path, options.rows, options.list), flush=True)


if __name__ == "__main__":
    main()
