"""The command line in a process of its own that can be killed; it is forked from one that has imported torch already."""

import os
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

# Here, so that the fork server has them.
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import lowalign.commands.best_of_n
import lowalign.commands.bitdelta
import lowalign.commands.dpo
import lowalign.commands.ppo
import lowalign.commands.reward
import lowalign.commands.run
import lowalign.commands.sft  # noqa: F401
from lowalign.cli import main
from tests.train import toy


def start(arguments: list[str], stderr: Path = Path(os.devnull), **environment: str) -> BaseProcess:
    process = toy.fork.Process(target=toy._child, args=(_main, (arguments, stderr), environment))
    process.start()
    return process


def run(arguments: list[str], stderr: Path = Path(os.devnull), **environment: str) -> int:
    """Its exit code, -N when signal N ended it."""
    return toy.in_child(_main, arguments, stderr, environment=environment)


def seconds(arguments: list[str]) -> float:
    """How long a command takes on this machine, without the start of the fork server."""
    run(["--version"])
    begin = time.monotonic()
    assert run(arguments) == 0
    return time.monotonic() - begin


def _main(arguments: list[str], stderr: Path) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.exit(main(arguments))
