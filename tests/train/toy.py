"""A host and a method small enough to check by hand: no transformers, no peft, a step in a millisecond."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes  # noqa: F401  here, so that the fork server has it
import torch
import torch.nn.functional as F
from torch import nn

from lowalign.config.sections import TrainConfig
from lowalign.data.pack import Example, step_order, total_supervised
from lowalign.model.adapters.flat import FlatWeights

torch.set_num_threads(1)
VOCABULARY = 24
CONFIG = TrainConfig(
    steps=8,
    batch_size=6,
    token_budget=30,
    learning_rate=1e-2,
    warmup=0.25,
    save_every=2,
    eval_every=2,
    checkpointing="off",
)
# Child processes come from a server that has imported what runs import and done nothing else.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.train.toy", "tests.commands.child"])


class ToyHost:
    """A frozen embedding and head; the adapter "policy" is an MLP between them, "value" a second one."""

    def __init__(self, seed: int = 0, working_dtype: torch.dtype = torch.float32, dropout: float = 0.2) -> None:
        torch.manual_seed(seed)
        width = 32
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        for p in [*self.embedding.parameters(), *self.head.parameters()]:
            p.requires_grad_(False)
        self.adapters = nn.ModuleDict({name: _mlp(width, dropout, working_dtype) for name in ("policy", "value")})
        self.modes: list[str | None] = []
        self.check = lambda: None
        frozen = [self.embedding.weight, self.head.weight, self.head.bias]
        self.base = SimpleNamespace(checksum=lambda: sum(int(t.detach().view(torch.int32).sum()) for t in frozen))
        self._working, self._flat = working_dtype, {}

    def train_only(self, *names: str) -> None:
        for name, module in self.adapters.items():
            module.requires_grad_(name in names)

    def flat(self, name: str) -> FlatWeights:
        if name not in self._flat:
            self._flat[name] = FlatWeights(dict(self.adapters[name].named_parameters()), self._working)
        return self._flat[name]

    def training(self, mode: str | None, **memory: int) -> None:
        self.modes.append(mode)
        self.adapters.train(mode is not None)

    def logits(self, ids: torch.Tensor, adapter: str) -> torch.Tensor:
        h = self.embedding(ids)
        module = self.adapters[adapter]
        return self.head(h + module(h.to(next(module.parameters()).dtype)).float())


def _mlp(width: int, dropout: float, dtype: torch.dtype | None) -> nn.Module:
    # 32·80 + 80 + 80·32 + 32 weights: more than the 4,096 from which bitsandbytes keeps 8-bit state.
    return nn.Sequential(nn.Linear(width, 80), nn.Tanh(), nn.Dropout(dropout), nn.Linear(80, width)).to(
        dtype or torch.float32
    )


class ToyMethod:
    """Next-token prediction on rows of unequal length; `hook(step, number of the micro-batch)` runs before each loss."""

    def __init__(
        self,
        host: ToyHost,
        lr_multipliers: dict[str, float] | None = None,
        batch_size: int = CONFIG.batch_size,
        hook: Callable[[int, int], None] | None = None,
    ) -> None:
        self.host, self.lr_multipliers, self.batch_size, self.hook = (
            host,
            lr_multipliers or {"policy": 1.0},
            batch_size,
            hook,
        )
        self.examples = rows(40, seed=1)
        self.step, self.calls = -1, 0
        self.rounds = torch.zeros(3)

    def batch(self, step: int) -> list[Example]:
        if step > self.step:
            self.rounds = self.rounds + torch.rand(3)  # state of its own that depends on the random generator
        self.step, self.calls = step, 0
        return [self.examples[i] for i in step_order(len(self.examples), self.batch_size, 0, step)]

    def epoch(self, steps: int) -> float:
        return steps * self.batch_size / len(self.examples)

    def normalizers(self, examples) -> dict[str, float]:
        return {"tokens": total_supervised(examples)}

    def loss(self, examples, normalizers) -> tuple[torch.Tensor, dict]:
        if self.hook is not None:
            self.hook(self.step, self.calls)
        self.calls += 1
        loss = 0.0
        for e in examples:
            ids = torch.tensor(e.prompt + e.completions[0])
            for adapter in self.lr_multipliers:
                logits = self.host.logits(ids[:-1], adapter)[len(e.prompt) - 1 :]
                loss = loss + F.cross_entropy(logits, ids[len(e.prompt) :], reduction="sum") / normalizers["tokens"]
        return loss, {"loss": loss.detach(), "rows": len(examples)}

    def state(self) -> dict:
        return {"rounds": self.rounds, "seen": self.step}

    def load_state(self, state: dict) -> None:
        self.rounds, self.step = state["rounds"], state["seen"]


def rows(count: int, seed: int) -> list[Example]:
    """Rows of 4 to 15 tokens that count up in sevens, so that what is learned on some holds for others."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        length, start = (
            int(torch.randint(low, high, (), generator=generator)) for low, high in ((4, 16), (0, VOCABULARY))
        )
        ids = [(start + 7 * k) % VOCABULARY for k in range(length)]
        examples.append(Example(ids[:2], [ids[2:]], source=f"toy.jsonl:{i + 1}"))
    return examples


def heldout() -> list[Example]:
    return rows(10, seed=2)


def run(
    out: Path,
    *,
    resume: bool = False,
    hook: Callable | None = None,
    method: ToyMethod | None = None,
    on_step=None,
    **changes,
):
    """A toy run of CONFIG with `changes`. Returns (host, method, Result)."""
    from lowalign.train.engine import train

    method = method or ToyMethod(ToyHost(), hook=hook)
    result = train(
        method.host, method, replace(CONFIG, **changes), out, heldout=heldout(), resume=resume, on_step=on_step
    )
    return method.host, method, result


def signal_at(step: int, call: int = 0, number: signal.Signals = signal.SIGINT) -> Callable[[int, int], None]:
    """A hook that has the process signal itself in the middle of a step."""
    return lambda *now: os.kill(os.getpid(), number) if now == (step, call) else None


def weights(host: ToyHost, name: str = "policy") -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in host.flat(name).tensors().values()])


def in_child(function: Callable, *args: object, environment: dict[str, str] | None = None) -> int:
    """Run it in a process of its own. Returns the exit code, -N when signal N ended it."""
    process = fork.Process(target=_child, args=(function, args, environment or {}))
    process.start()
    process.join()
    return process.exitcode


def _child(function: Callable, args: tuple, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*args)


def in_processes(count: int, function: Callable, *args: object) -> list[int]:
    """Run it in several processes of one run, as torchrun starts them. Returns their exit codes."""
    started = start_processes(count, function, *args)
    for process in started:
        process.join(60)
    return [process.exitcode for process in started]


def start_processes(count: int, function: Callable, *args: object) -> list[multiprocessing.process.BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [launcher | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    started = [fork.Process(target=_child, args=(function, args, environment)) for environment in ranks]
    for process in started:
        process.start()
    return started
