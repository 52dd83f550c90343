"""The verbs as functions: `import lowalign as la; run = la.sft(base, data="rows.jsonl", out="runs/first", steps=200)`.

Options are those of the command, checked by the same parser: `train={"steps": 200}` for --train.steps, or `steps=200` where one
option has that name (of several the one of --train). What the command would print as an error is raised as UserError.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from lowalign.commands.api_rows import Data, with_files
from lowalign.config import recipe
from lowalign.config.keywords import flags_of
from lowalign.config.sections import Sampling, TrainConfig
from lowalign.config.verbs import verbs
from lowalign.data.chat import Chat
from lowalign.data.dataset import load_examples
from lowalign.data.pack import Example
from lowalign.data.prompts import PromptRow, prompt_ids
from lowalign.data.rows.turns import Message
from lowalign.model.adapters.files import adapter_template
from lowalign.model.base.base import Base
from lowalign.model.host import Host
from lowalign.model.policy import Stack, load_policy
from lowalign.report.plot import metrics_plot
from lowalign.rewards.spec import FUNCTIONS
from lowalign.train import checkpoint
from lowalign.train.engine import OnStep
from lowalign.train.method import Method
from lowalign.train.run import Job, check_and_log_start, load_rows, run

Reward = str | Path | Callable[..., Sequence[float]]


@dataclass(frozen=True)
class Run:
    """A finished run in the folder `out`."""

    base: Base
    out: Path

    @property
    def adapter(self) -> Path:
        """The adapter folder."""
        return self.out / "adapter"

    @property
    def metrics(self) -> Any:
        """The lines of metrics.jsonl: a DataFrame where pandas is installed, else dictionaries."""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        try:
            from pandas import DataFrame
        except ImportError:
            return lines
        return DataFrame(lines)

    def _repr_html_(self) -> str:
        """In a notebook: its folder, and its curves as SVG."""
        return f"<code>{escape(str(self.out))}</code><br>{metrics_plot(self.out / 'metrics.jsonl') or ''}"

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss; None without held-out rows."""
        best = checkpoint.read_best(self.out)
        return best[0] if best else None

    def generate(self, prompts: str | Sequence[str | list[Message]], **sampling: Any) -> list[str]:
        """The answer to each prompt (text is a user's turn). sampling: fields of lowalign.Sampling, such as temperature=0.7."""
        host = Host(self.base)
        chat = Chat(self.base.tokenizer, adapter_template([str(self.out)]))
        own_ends = self.base.eos_ids
        self.base.end_at(chat.end_of_turn)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        turns = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        ids = [prompt_ids(chat, PromptRow(messages, f"prompt {i}")) for i, messages in enumerate(turns)]
        stack = load_policy(host, [str(self.out)])
        try:
            with host.use(*stack):
                answers = host.generate(ids, 1, Sampling(**sampling))
        finally:
            self.base.eos_ids = own_ends
            for name in stack:
                host.delete(name)
        return [self.base.tokenizer.decode(row[0].ids, skip_special_tokens=True) for row in answers]


def sft(
    base: Base | str | Path,
    *,
    data: Data,
    out: str | Path,
    recipe: str | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Run:
    """`lowalign sft`.

    base: loaded, or a folder or Hub id. data: files, a Hub data set, rows, or a datasets.Dataset. recipe: a packaged one or a
    file. on_step: called after each step with its number, counted from 1, and its metrics; those of the last evaluation are
    eval/…. Where it returns False the run ends with this step; where it raises, a checkpoint is saved first. Raises
    UserError, and KeyboardInterrupt when Ctrl-C stopped it (resume=True goes on).
    """
    return _train("sft", base, out, {"data": data, **options}, recipe, on_step)


def reward(
    base: Base | str | Path,
    *,
    data: Data,
    out: str | Path,
    recipe: str | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Run:
    """`lowalign reward`; as sft."""
    return _train("reward", base, out, {"data": data, **options}, recipe, on_step)


def dpo(
    base: Base | str | Path,
    *,
    data: Data,
    out: str | Path,
    recipe: str | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Run:
    """`lowalign dpo`; as sft."""
    return _train("dpo", base, out, {"data": data, **options}, recipe, on_step)


def ppo(
    base: Base | str | Path,
    *,
    data: Data,
    reward: Reward | Sequence[Reward],
    out: str | Path,
    recipe: str | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Run:
    """`lowalign ppo`; as sft. reward: a run, FILE.py:NAME, or a function of prompts, completions and columns of
    the rows that returns numbers."""
    with _specs(reward) as specs:
        return _train("ppo", base, out, {"data": data, "reward": specs, **options}, recipe, on_step)


def best_of_n(
    base: Base | str | Path,
    *,
    data: Data,
    reward: Reward | Sequence[Reward],
    out: str | Path,
    recipe: str | None = None,
    **options: Any,
) -> Path:
    """`lowalign best-of-n`; as ppo. Returns the folder with best.jsonl, pairs.jsonl and rankings.jsonl."""
    with _specs(reward) as specs:
        return _train("best-of-n", base, out, {"data": data, "reward": specs, **options}, recipe).out


def train_with(
    method: Callable[[Host, Sequence[Example], Stack, TrainConfig], Method],
    base: Base | str | Path,
    *,
    data: Data,
    out: str | Path,
    recipe: str | None = None,
    on_step: OnStep | None = None,
    **options: Any,
) -> Run:
    """A method of your own on the rows and options of `lowalign sft`, with its loop, checkpoints and adapter folder.

    method: makes a Method (lowalign.train.method) from the host, the Examples, the stack of adapters (the last is trained) and
    the options of the loop; such as a subclass of lowalign.methods.sft.SFT with another `loss`.
    """
    out = Path(out).expanduser()
    base = base if isinstance(base, Base) else Base.load(base)
    config = _parsed("sft", base, with_files({"data": data, **options}, out), recipe)

    def start(host: Host, rows: Sequence[Example], heldout: Sequence[Example], policy: Stack, initial: Stack) -> Method:
        check_and_log_start(host, policy, initial, rows, config)
        return method(host, rows, policy, config.train)

    name = getattr(method, "__name__", "own").lower()
    return _finished(run(config, Job(name, partial(load_rows, config, load_examples), start), base, on_step), base, out)


def LoRA(**options: Any) -> dict[str, Any]:
    """For adapter=…: options such as r=16, alpha=32, targets=["q_proj"]."""
    return {"kind": "lora", **options}


def PromptTuning(**options: Any) -> dict[str, Any]:
    """For adapter=…: options such as virtual_tokens=20, init_text="…"."""
    return {"kind": "prompt", **options}


def PrefixTuning(**options: Any) -> dict[str, Any]:
    """For adapter=…: options such as virtual_tokens=20."""
    return {"kind": "prefix", **options}


def _train(
    verb: str,
    base: Base | str | Path,
    out: str | Path,
    given: dict[str, Any],
    recipe_name: str | None,
    on_step: OnStep | None = None,
) -> Run:
    out = Path(out).expanduser()
    base = base if isinstance(base, Base) else Base.load(base)
    config = _parsed(verb, base, with_files(given, out), recipe_name)
    module, _, function = next(v.function for v in verbs() if v.name == verb).partition(":")
    arguments = (base, on_step) if on_step else (base,)  # best-of-n has no steps
    return _finished(getattr(import_module(f"lowalign.{module}"), function)(config, *arguments), base, out)


def _finished(code: int, base: Base, out: Path) -> Run:
    if code:
        raise KeyboardInterrupt(f"stopped; {out} goes on with resume=True")
    return Run(base, out)


def _parsed(verb: str, base: Base, given: Mapping[str, Any], recipe_name: str | None) -> Any:
    """The configuration of the verb, by the parser of the command line."""
    config = next(v.config for v in verbs() if v.name == verb)
    flags = flags_of(verb, config, given)
    identity = base.identity
    flags.append(f"--model={identity.name if identity.revision else base.folder}")
    if identity.revision:
        flags.append(f"--base.revision={identity.revision}")
    dtype = str(base.dtype).removeprefix("torch.")
    flags += [f"--base.quantization={identity.quantization}", f"--base.dtype={dtype}"]
    path = recipe.find(recipe_name) if recipe_name else None
    return recipe.parse(config, flags, path, f"lowalign.{verb.replace('-', '_')}")


@contextmanager
def _specs(rewards: Reward | Sequence[Reward]) -> Iterator[list[str]]:
    """--reward for each; functions are known by their names within it."""
    rewards = [rewards] if isinstance(rewards, str | Path) or callable(rewards) else rewards
    functions = {getattr(r, "__name__", "reward"): r for r in rewards if callable(r)}
    FUNCTIONS.update(functions)
    try:
        yield [getattr(r, "__name__", "reward") if callable(r) else str(r) for r in rewards]
    finally:
        for name in functions:
            del FUNCTIONS[name]
