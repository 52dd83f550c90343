"""All that only a card can show, in one command: `make gpu`. Each result is on disk as soon as it is there.

    python benchmarks/gpu.py --out gpu.jsonl                  # every part, under ten minutes; needs a CUDA device
    python benchmarks/gpu.py --out gpu.jsonl --only sampler   # some parts again; --list names them
    python benchmarks/gpu.py --out tiny.jsonl --tiny          # the same code on the CPU, in seconds
    python benchmarks/gpu.py --table gpu.jsonl                # the results as Markdown
    python benchmarks/gpu.py --predict "RTX 4090"             # what the cases will take, by dry runs; needs no device

First what could be silently wrong (gpu_checks.py), then speed and memory under a 24 GB cap with the prediction of `lowalign plan`
beside them (gpu_cases.py), then the peers where they are installed (gpu_peers.py). A part that fails leaves its traceback in the file,
and the next one runs. The parts run in a process of their own, which is replaced when it dies, breaks the device or
exceeds a part's time. Nothing is downloaded: weights are random.
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from gpu_table import table

MINUTES = 10.0  # for all; parts that have not begun by then are left out
IMPORTS = 60.0  # seconds that a fresh process may take besides its first part
PREDICTED = ("sft-2048", "sft-8192", "sft-131072", "sft-32b-8192", "dpo", "reward", "ppo")
BROKEN = 3  # exit code of a process whose device no longer answers
MARK = "@@"
SCRIPT = Path(__file__)  # what a process of its own runs


class Part(NamedTuple):
    """function: MODULE:NAME, called with a Setup; it returns figures. limit: seconds."""

    name: str
    function: str
    limit: float


PARTS = [
    Part("machine", "gpu_setup:machine", 30),
    Part("self-tests", "gpu_checks:self_tests", 40),
    Part("base", "gpu_checks:base_against_cpu", 60),
    Part("checkpointing", "gpu_checks:checkpointing", 40),
    Part("memory-gradients", "gpu_checks:out_of_memory_in_gradients", 40),
    Part("memory-sampling", "gpu_checks:out_of_memory_in_sampling", 40),
    Part("paging", "gpu_checks:paging", 30),
    Part("ppo-round", "gpu_checks:ppo_round", 40),
    Part("sampler", "gpu_checks:sampler", 60),
    Part("sft-2048", "gpu_cases:sft_2048", 90),
    Part("sft-8192", "gpu_cases:sft_8192", 60),
    Part("dpo", "gpu_cases:dpo", 60),
    Part("reward", "gpu_cases:reward", 60),
    Part("ppo", "gpu_cases:ppo", 120),
    Part("best-of-n", "gpu_cases:best_of_n", 60),
    Part("sft-131072", "gpu_cases:sft_131072", 150),
    Part("sft-32b-8192", "gpu_cases:sft_32b", 90),
    Part("merge", "gpu_cases:merge", 60),
    Part("bitdelta", "gpu_cases:bitdelta", 60),
    Part("peft", "gpu_peers:plain_peft", 60),
    Part("trl", "gpu_peers:trl_sft", 90),
    Part("unsloth", "gpu_peers:unsloth_sft", 120),
]


def main(words: list[str] | None = None) -> int:
    """Run the parts, and print the table. Returns 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.jsonl"), help="a line of JSON for each result; appended to"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--only", nargs="*", metavar="PART", help="these parts only")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="parts that have not begun by then are left out")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the results in a file and end")
    parser.add_argument("--predict", metavar="CARD", help="print predictions of the cases for this card and end")
    parser.add_argument("--in-process", action="store_true", help="no process of its own: for a debugger")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.table:
        print(table(read(options.table)))
        return 0
    parts = chosen(options.only, parser)
    if options.list:
        print("\n".join(f"{part.name:18}{part.function:40}{part.limit:4.0f} s" for part in parts))
        return 0
    if options.predict:
        predict([part for part in parts if part.name in PREDICTED], options.predict)
        return 0
    if options.worker:
        return work(parts, options.tiny, options.out, sys.stdin.readline)
    since = len(read(options.out))
    if options.in_process:
        work(parts, options.tiny, options.out, lambda: True)
    else:
        supervise(parts, options.tiny, options.out, options.minutes * 60)
    results = read(options.out)[since:]
    text = table(results)
    options.out.with_suffix(".md").write_text(text + "\n")
    print(text)
    failed = [result["part"] for result in results if not result["ok"]]
    if failed:
        tiny = " --tiny" if options.tiny else ""
        print(f"\nagain: python benchmarks/gpu.py{tiny} --out {options.out} --only {' '.join(failed)}")
    return int(bool(failed))


def chosen(names: list[str] | None, parser: argparse.ArgumentParser) -> list[Part]:
    """The parts of these names; all without names."""
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names or () if name not in known]:
        parser.error(f"there is no part {', '.join(unknown)}; --list names them")
    return [known[name] for name in names] if names is not None else list(PARTS)


def predict(parts: list[Part], card: str) -> None:
    """Print the predictions of these cases as rows of docs/benchmarks.md."""
    setup = import_module("gpu_setup").Setup(False, card)
    for part in parts:
        figures = getattr(import_module("gpu_cases"), part.function.partition(":")[2])(setup)
        print(
            f"| {part.name} | not measured | {figures['predicted_gib']:.2f} | {figures['roofline_tokens_per_second']:,.0f} |",
            flush=True,
        )


# -- in the process that computes -------------------------------------------------------------------------------------


def work(parts: list[Part], tiny: bool, out: Path, go: Callable[[], object]) -> int:
    """Run the parts one after the other while `go` says so, each result a line of the file. Returns BROKEN when the device must
    not be used on."""
    setup = None
    for part in parts:
        if not go():
            return 0
        print(f"{MARK} begin {part.name}", flush=True)
        started, result = time.perf_counter(), {}
        try:
            if setup is None:
                setup = import_module("gpu_setup").Setup(tiny)
            module, _, name = part.function.partition(":")
            figures = getattr(import_module(module), name)(setup)
            result = {"ok": all(value <= bound for value, bound in figures.get("checks", {}).values())} | figures
        except Exception as error:
            last = str(error).strip().splitlines() or [""]
            result = {"ok": False, "error": f"{type(error).__name__}: {last[0]}", "traceback": traceback.format_exc()}
        write(out, {"part": part.name} | result | {"seconds": round(time.perf_counter() - started, 1)})
        print(f"{MARK} end {part.name}", flush=True)
        if setup is not None and not setup.still_works():
            return BROKEN
    return 0


# -- in the process that watches it -----------------------------------------------------------------------------------


def supervise(parts: list[Part], tiny: bool, out: Path, seconds: float) -> None:
    """Run the parts in processes of their own: a new one after each that dies or hangs, from the next part on."""
    ends, waiting = time.monotonic() + seconds, list(parts)
    while waiting:
        waiting = _one_process(waiting, tiny, out, ends)


def _one_process(waiting: list[Part], tiny: bool, out: Path, ends: float) -> list[Part]:
    """-> the parts that are still to be run."""
    command = [sys.executable, str(SCRIPT), "--worker", "--out", str(out), "--only", *(p.name for p in waiting)]
    command += ["--tiny"] if tiny else []
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _go(worker)
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(worker.stdout, lines), daemon=True).start()
    waiting, current, limit = list(waiting), None, IMPORTS
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            worker.kill()
            line, why = None, f"no end after {limit:.0f} s"
        else:
            why = None
        if line is None:
            code = worker.wait()
            if current is None and waiting and code != BROKEN:  # it died before its first part, or between two
                current = waiting.pop(0)
            if current is not None:
                write(out, {"part": current.name, "ok": False, "error": why or f"the process ended with {code}"})
            return waiting
        if line.split()[1] == "end":
            current, limit = None, IMPORTS
            if waiting and time.monotonic() > ends:
                worker.stdin.close()
                worker.wait()
                for part in waiting:
                    write(out, {"part": part.name, "ok": False, "error": "left out: no time (--minutes)"})
                return []
            if not waiting:
                worker.stdin.close()
                worker.wait()
                return []
            _go(worker)
        else:
            current = waiting.pop(0)
            limit = current.limit + IMPORTS
            print(f"{current.name} …", file=sys.stderr, flush=True)


def _go(worker: subprocess.Popen) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen when its output is read
        worker.stdin.write("go\n")
        worker.stdin.flush()


def _read_lines(stream, lines: queue.Queue) -> None:
    for line in stream:
        if line.startswith(MARK):
            lines.put(line)
    lines.put(None)


# -- the file ---------------------------------------------------------------------------------------------------------


def write(out: Path, result: dict) -> None:
    """Append a line, and wait until it is on the disk."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> list[dict]:
    """The results in the file, in order."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


if __name__ == "__main__":
    sys.exit(main())
