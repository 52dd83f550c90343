"""lowalign beside trl and beside plain transformers + peft: CPU seconds of a training step, peak memory, and the loss.

    python benchmarks/peers.py --case all --pairs 10 --out peers.json          # about 20 minutes; needs lowalign[bench]
    python benchmarks/peers.py --case ppo --trl-python PATH --out ppo.json     # 10 minutes; PATH: see below
    python benchmarks/peers.py --tiny --pairs 2 --out tiny.json                # lowalign and plain only, in a minute

One case at a time, each contestant in a process of its own (contestants.py says what each does), one thread. They
take turns: in each round each trains one step on the same rows, and the ratio is taken within the round, so that other
load of the machine affects all alike. Time is CPU seconds of the process, from one step's end to the next. The first
rounds are warm-up. Model: a random Llama with hidden size 512, 8 layers and a vocabulary of 32000 in NF4 with double
quantization; LoRA of rank 16 on all linear layers but the head.

allocator glibc: the default. tuned: memory is never returned to the system (MALLOC_ settings below); with the default, page
faults take a large part of every contestant's CPU time.
The peers use transformers' eager attention, on the CPU faster than the default sdpa (by 10 to 20 % of a step, as the
backward of the flash kernel is slow there); --attention sdpa uses the default.
--against lowalign-exact lowalign-lora: what each of our fused parts is worth (contestants.py).
Quote the ratio to the fastest peer: "to_fastest_peer".

In the case ppo a step is a whole round: 8 prompts of 300 tokens, 4 samples of 64 tokens each, 2 epochs of 4 minibatches.
trl dropped PPO after 1.12.0, so trl runs in an environment of its own: --trl-python is the interpreter of one in which
`pip install --no-deps trl==1.12.0` was added to what lowalign[bench] has. The case is not among "all".
The samples differ, so the losses agree only in size.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import astuple
from pathlib import Path

from cases import CASES, SHAPES, Settings, make_model

CONTESTANTS = Path(__file__).with_name("contestants.py")
NAMES = ("lowalign", "trl", "plain", "plain-cached")
VARIANTS = ("lowalign-exact", "lowalign-lora", "lowalign-compiled")
ALLOCATORS = {
    "glibc": {},
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736", "MALLOC_TOP_PAD_": "268435456"},
}


class Contestant:
    """A process that trains one step on request."""

    def __init__(
        self, name: str, case: str, shape: str, folder: Path, options: argparse.Namespace, allocator: str
    ) -> None:
        self.name, self.log, self.steps = name, folder / f"{name}.log", []
        settings = Settings(options.checkpointing, options.attention)
        rounds = options.warmup + options.pairs
        arguments = [name, case, shape, str(folder / "model"), str(rounds), *astuple(settings)]
        if options.tiny and case != "ppo":
            return self._fork(arguments)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "LD_PRELOAD"}
        environment |= ALLOCATORS[allocator] | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        command = [options.trl_python if name == "trl" else sys.executable, CONTESTANTS, *arguments]
        with self.log.open("w") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            process = subprocess.Popen(command, **pipes, text=True, env=environment)
        self.pid, self.wait, self.requests, self.answers = process.pid, process.wait, process.stdin, process.stdout

    def _fork(self, arguments: list[str]) -> None:
        """A fork of this process instead of a fresh one, which would import for seconds; its memory means nothing."""
        import contestants

        (requests_out, requests_in), (answers_out, answers_in) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            with self.log.open("w") as log:
                os.dup2(log.fileno(), 2)
            os.dup2(requests_out, 0)
            os.dup2(answers_in, 1)
            os.closerange(3, 4096)  # the other ends, and those of other contestants
            sys.argv[1:] = arguments
            try:
                contestants.main()
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.close(requests_out)
        os.close(answers_in)
        self.wait = lambda: os.waitpid(self.pid, 0)
        self.requests, self.answers = os.fdopen(requests_in, "w"), os.fdopen(answers_out)

    def ready(self) -> None:
        """Wait until it has loaded."""
        self.start = self._answer()
        assert self.start["threads"] == 1

    def step(self) -> None:
        """Let it train one step, and wait for it."""
        self.requests.write("step\n")
        self.requests.flush()
        self.steps.append(self._answer())

    def stop(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        self.requests.close()
        self.answers.close()

    def _answer(self) -> dict:
        line = self.answers.readline()
        if not line:
            sys.exit(f"{self.name} has ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", nargs="+", choices=[*CASES, "ppo", "all"], default=["all"])
    parser.add_argument("--pairs", type=int, default=10, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those that count")
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both")
    parser.add_argument(
        "--checkpointing", choices=["on", "off"], default="off", help="recompute activations, all of them"
    )
    parser.add_argument("--attention", choices=["eager", "sdpa"], default="eager", help="of the peers")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and short rows, in forks, without trl but in ppo"
    )
    parser.add_argument(
        "--trl-python", type=Path, default=Path(sys.executable), help="the interpreter that trl runs in"
    )
    parser.add_argument("--against", nargs="+", choices=[*NAMES, *VARIANTS], help="compare with these alone")
    options = parser.parse_args()
    shape = "tiny" if options.tiny else "full"
    report = {
        "machine": machine(),
        "versions": versions(options.trl_python),
        "model": SHAPES[shape],
        "checkpointing": options.checkpointing,
        "attention_of_peers": options.attention,
    }
    report |= {"allocators": ALLOCATORS, "results": []}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"), shape)
        for case in CASES if "all" in options.case else options.case:
            for allocator in ALLOCATORS if options.allocator == "both" else [options.allocator]:
                result = compare(case, shape, Path(folder), options, allocator)
                report["results"].append(result)
                print("\n".join(describe(result)), flush=True)
                options.out.write_text(json.dumps(report, indent=2) + "\n")


def compare(case: str, shape: str, folder: Path, options: argparse.Namespace, allocator: str) -> dict:
    """All contestants on one case, in turns."""
    names = ["lowalign", "trl"] if case == "ppo" else [n for n in NAMES if n != "plain-cached" or case == "dpo"]
    if options.against:
        names = ["lowalign", *options.against]
    if options.tiny and case != "ppo" and "trl" in names:
        names.remove("trl")
    running = []
    try:
        for name in names:
            running.append(Contestant(name, case, shape, folder, options, allocator))
        for contestant in running:
            contestant.ready()
        for r in range(options.warmup + options.pairs):
            first = r % len(running)  # another one is first in each round
            for contestant in running[first:] + running[:first]:
                contestant.step()
    finally:
        for contestant in running:
            contestant.stop()
    return {"case": case, "allocator": allocator} | summary(running, options.warmup)


def summary(contestants: list[Contestant], warmup: int) -> dict:
    """Time, memory and loss of each contestant, and the ratios to lowalign within the rounds."""
    ours, figures = contestants[0], {}
    for c in contestants:
        counted = c.steps[warmup:]
        cpu = [s["cpu"] for s in counted]
        figures[c.name] = {
            "cpu_seconds": round(statistics.median(cpu), 3),
            "fastest": round(min(cpu), 3),
            "imports_mb": c.start["imports"],
            "rss_before_mb": c.start["rss"],
            "peak_mb": (peak := max(s["peak"] for s in c.steps)),
            "peak_above_imports_mb": peak - c.start["imports"],
            "first_loss": c.steps[0]["loss"],
            "mean_loss": statistics.mean(s["loss"] for s in c.steps),
            "largest_loss_difference": max(
                abs(a["loss"] - b["loss"]) for a, b in zip(c.steps, ours.steps, strict=True)
            ),
        }
        if c is not ours:
            ratios = [a["cpu"] / b["cpu"] for a, b in zip(counted, ours.steps[warmup:], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            figures[c.name] |= {"ratio": round(middle, 3), "ratio_quartiles": [round(low, 3), round(high, 3)]}
    fastest = min((n for n in figures if n != ours.name), key=lambda n: figures[n]["ratio"])
    return {"fastest_peer": fastest, "to_fastest_peer": figures[fastest]["ratio"], "contestants": figures}


def describe(result: dict) -> list[str]:
    """The result as a table of text."""
    lines = [f"{result['case']}, allocator {result['allocator']}: {result['to_fastest_peer']:.2f} times the fastest peer ({result['fastest_peer']})"]  # fmt: skip
    for name, c in result["contestants"].items():
        ratio = (
            f"{c['ratio']:5.2f} ({c['ratio_quartiles'][0]:.2f}-{c['ratio_quartiles'][1]:.2f})" if "ratio" in c else ""
        )
        lines.append(
            f"  {name:13}{c['cpu_seconds']:8.3f} CPU s/step, peak {c['peak_mb']:5} MB ({c['peak_above_imports_mb']} above imports), first loss {c['first_loss']:.6f}, "
            f"mean {c['mean_loss']:.6f} (off by at most {c['largest_loss_difference']:.1e}) {ratio}"
        )
    return lines


def machine() -> dict:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())  # fmt: skip
    return {"cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()[0], "libc": " ".join(platform.libc_ver())}


def versions(trl_python: Path) -> dict:
    installed = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    command = [trl_python, "-c", "import importlib.metadata; print(importlib.metadata.version('trl'))"]
    return installed | {"trl": subprocess.run(command, capture_output=True, text=True).stdout.strip() or None}


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
