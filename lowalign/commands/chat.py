"""`lowalign chat`: talk to adapters on one base, and switch between them without loading anything."""

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from transformers import TextStreamer

from lowalign.commands.policies import base_named_by
from lowalign.config.commands import ChatConfig
from lowalign.config.sections import Sampling
from lowalign.data.chat import Chat
from lowalign.data.rows.turns import Message
from lowalign.durable import json_line
from lowalign.errors import UserError
from lowalign.log import log
from lowalign.model.adapters.files import adapter_template, locate, refuse_reward_runs
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_stack

HELP = """\
/use NAME…            answer with this adapter, or with several stacked; /use off: with the bare base
/compare NAME NAME…   answer the last question under each, side by side (off: the bare base)
/system TEXT          set the system message; without TEXT, remove it
/regenerate           answer the last question again
/reset                forget the conversation
/set NAME VALUE       change a sampling option, such as temperature 0.7; without any, show them
/save FILE            add the conversation to FILE as a row that sft reads
/help, /quit"""


def chat(config: ChatConfig) -> int:
    """Run the command. Returns the exit code."""
    refuse_reward_runs(config.adapters)
    model = base_named_by(config.model, config.adapters[::-1])
    session = Session(Host(Base.load(model, **vars(config.base))), config)
    log(
        f"adapters: {', '.join(session.stacks) or 'none'}; answering with {session.active_names}. /help lists the commands"
    )
    for line in _lines():
        with _reported():
            if not session.run(line):
                return 0
    return 0


class Session:
    """A conversation, and the adapters that can answer in it. stacks: by the name that the user gives."""

    def __init__(self, host: Host, config: ChatConfig) -> None:
        self.host, self.sampling = host, config.sampling
        self.stacks: dict[str, Stack] = {}
        self.templates: dict[str, str | None] = {}
        self._chats: dict[str | None, Chat] = {}
        self._own_ends = host.base.eos_ids
        for i, source in enumerate(config.adapters):
            folder = Path(locate(source))
            name = folder.parent.name if folder.name == "adapter" else folder.name
            name = name if name not in (*self.stacks, "off") else f"{name}-{i + 1}"
            self.stacks[name] = load_stack(host, f"adapter{i}", source, config.allow_base_mismatch)
            self.templates[name] = adapter_template([source])
        self.active: list[str] = list(self.stacks)[:1]
        self.messages: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
        self.answers = 0  # sampled so far; each has its own random numbers
        self.commands: dict[str, Callable[[list[str]], object]] = {
            "/use": self.use,
            "/compare": self.compare,
            "/system": self.system,
            "/regenerate": self.regenerate,
            "/reset": self.reset,
            "/set": self.set,
            "/save": self.save,
            "/help": lambda _: log(HELP),
        }

    @property
    def active_names(self) -> str:
        """What answers, in words."""
        return " + ".join(self.active) or "the bare base"

    def run(self, line: str) -> bool:
        """Answer a question or run a command. Returns whether the conversation goes on. Raises UserError."""
        words = line.split()
        if words[:1] == ["/quit"]:
            return False
        if words and words[0] in self.commands:
            self.commands[words[0]](words[1:])
        elif line.startswith("/"):
            raise UserError(f"{words[0]} is not known; /help lists the commands")
        elif words:
            self.messages.append({"role": "user", "content": line})
            self._answer()
        return True

    # -- commands -----------------------------------------------------------------------------------------------------

    def use(self, names: list[str]) -> None:
        """Choose the adapters that answer."""
        with self._using(names):  # to report what cannot act together
            self.active = [] if names == ["off"] else names
        log(f"answering with {self.active_names}")

    def compare(self, names: list[str]) -> None:
        """Answer the last question under each."""
        if len(names) < 2:
            raise UserError("name at least two: /compare NAME NAME…")
        before = self._before_answer()
        texts = [self._sample(before, [name], print_it=False)[0] for name in names]
        width = (shutil.get_terminal_size().columns - 3 * (len(names) - 1)) // len(names)
        columns = [[name, "-" * width, *_wrapped(text, width)] for name, text in zip(names, texts, strict=True)]
        for row in zip_longest(*columns, fillvalue=""):
            print(" | ".join(cell.ljust(width) for cell in row).rstrip(), flush=True)

    def system(self, words: list[str]) -> None:
        """Set or remove the system message."""
        turns = [m for m in self.messages if m["role"] != "system"]
        self.messages = [{"role": "system", "content": " ".join(words)}, *turns] if words else turns

    def regenerate(self, _: list[str]) -> None:
        """Replace the last answer."""
        before, self.messages = self.messages, self._before_answer()
        try:
            self._answer()
        except UserError:
            self.messages = before
            raise

    def reset(self, _: list[str]) -> None:
        """Keep the system message only."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def set(self, words: list[str]) -> None:
        """Change a sampling option."""
        options = vars(self.sampling)
        if not words:
            log("  ".join(f"{name} {value}" for name, value in options.items()))
            return
        kinds = {name: type(value) for name, value in options.items()}
        name = words[0].replace("-", "_")
        if len(words) != 2 or name not in kinds:
            raise UserError(f"/set NAME VALUE, where NAME is one of {', '.join(kinds)}")
        try:
            value = kinds[name](words[1])
        except ValueError:
            raise UserError(f"{name} takes a number, not {words[1]}") from None
        if (choices := get_args(get_type_hints(Sampling)[name])) and value not in choices:
            raise UserError(f"{name} is one of {', '.join(choices)}, not {words[1]}")
        self.sampling = replace(self.sampling, **{name: value})

    def save(self, words: list[str]) -> None:
        """Add the conversation to a file."""
        if len(words) != 1 or self.messages[-1:] == [] or self.messages[-1]["role"] != "assistant":
            raise UserError("/save FILE keeps a conversation that ends with an answer")
        try:
            with Path(words[0]).expanduser().open("a", encoding="utf-8") as file:
                file.write(json_line({"messages": self.messages}))
        except OSError as error:
            raise UserError(f"{words[0]} cannot be written: {error.strerror}") from error
        log(f"added to {words[0]}")

    # -- inside -------------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        try:
            text, stopped = self._sample(self.messages, self.active or ["off"], print_it=True)
        except UserError:
            self.messages.pop()  # the question that has no answer
            raise
        self.messages.append({"role": "assistant", "content": text})
        if not stopped:
            log(f"(cut off after {self.sampling.max_new_tokens} tokens; /set max-new-tokens N allows more)")

    def _sample(self, messages: list[Message], names: list[str], print_it: bool) -> tuple[str, bool]:
        """-> the answer, and whether it ended by itself. Ctrl-C ends it early."""
        base, chat = self.host.base, self._chat(names)
        base.eos_ids = self._own_ends  # without the ends of turn of the other templates
        base.end_at(chat.end_of_turn)
        self.answers += 1
        ids: list[int] = []
        streamer = TextStreamer(base.tokenizer, skip_special_tokens=True)

        def stream(token: int) -> None:
            ids.append(token)
            if print_it:
                streamer.put(torch.tensor([token]))

        with self._using(names):
            prompt = chat.prompt_ids(messages)
            try:
                self.host.generate([prompt], 1, self.sampling, [self.answers], on_token=stream)
            except KeyboardInterrupt:
                log("(stopped)")
        if print_it:
            streamer.end()
        stopped = bool(ids) and ids[-1] in base.eos_ids
        text = base.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return text, stopped or len(ids) < self.sampling.max_new_tokens

    def _chat(self, names: list[str]) -> Chat:
        """With the template of the last of these adapters that has one."""
        template = next((self.templates[n] for n in reversed(names) if self.templates.get(n)), None)
        if template not in self._chats:
            self._chats[template] = Chat(self.host.base.tokenizer, template)
        return self._chats[template]

    @contextlib.contextmanager
    def _using(self, names: list[str]) -> Iterator[None]:
        unknown = [name for name in names if name not in self.stacks and names != ["off"]]
        if unknown or not names:
            raise UserError(
                f"{' '.join(unknown) or 'nothing'} is not loaded; there are: {', '.join([*self.stacks, 'off'])}"
            )
        with self.host.use(*(part for name in names for part in self.stacks.get(name, ()))):
            yield

    def _before_answer(self) -> list[Message]:
        """The conversation up to the last question. Raises UserError when none was asked."""
        ends = [i + 1 for i, m in enumerate(self.messages) if m["role"] == "user"]
        if not ends:
            raise UserError("ask something first")
        return self.messages[: ends[-1]]


def _lines() -> Iterable[str]:
    """Lines of a terminal, with editing and history, or of a pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` editing and history; not on Windows
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """A user's mistake ends the command, not the conversation."""
    try:
        yield
    except UserError as error:
        log(str(error))


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
