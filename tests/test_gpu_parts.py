"""`make gpu` in its tiny form on the CPU: every part of it, and what watches over the parts."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> the exit code, the results by part, and the table."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu

        out = tmp_path_factory.mktemp("gpu") / "tiny.jsonl"
        code = gpu.main(["--tiny", "--in-process", "--out", str(out)])
        return code, {r["part"]: r for r in gpu.read(out)}, out.with_suffix(".md").read_text(), gpu.PARTS
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_part_runs_and_passes(run):
    code, results, table, parts = run
    failed = {name: result.get("traceback", result) for name, result in results.items() if not result["ok"]}
    assert not failed and code == 0
    assert list(results) == [part.name for part in parts]
    assert set(results["machine"]["versions"]) >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert "Failed" not in table and all(f"| {name} |" in table for name in results if name != "machine")


def test_the_checks_compare_something(run):
    """Rounding to bf16 shows; where bits must be equal they are; memory ran out, and smaller parts did it."""
    _, results, _, _ = run
    checks = {
        name: {key: value for key, (value, _) in r["checks"].items()} for name, r in results.items() if "checks" in r
    }
    assert checks["base"]["gradient"] > 1e-3 and checks["base"]["log-probs, mean distance"] > 1e-4
    tiles = {name: value for name, value in checks["checkpointing"].items() if name.startswith("tiles")}
    assert len(tiles) == 2 and len(checks["checkpointing"]) == 7
    assert {value for name, value in checks["checkpointing"].items() if name not in tiles} == {0.0}
    assert checks["memory-gradients"]["forward: share of the token budget left"] == 0.5
    assert checks["memory-gradients"]["backward: share of the token budget left"] == 0.5
    assert checks["sampler"]["mean distance"] > 1e-4 and results["sampler"]["tokens"] == 40


def test_the_cases_learn_and_stand_beside_a_prediction(run):
    _, results, _, _ = run
    for name in ("sft-2048", "sft-8192", "sft-131072", "sft-32b-8192", "dpo", "reward"):
        assert results[name]["tokens_per_second"] > 0 and 0 < results[name]["predicted_gib"] < 0.1
        assert results[name]["predicted_by"] == "dry run"
    assert 5 < results["sft-2048"]["loss"] < 8  # random weights, 512 tokens: ln 512 = 6.2
    assert results["sft-2048"]["state_is_paged"] is results["sft-2048"]["state_is_paged_after_resume"] is False
    assert {results[name]["checkpointing"] for name in ("sft-131072", "sft-32b-8192")} == {"offload"}
    ppo = results["ppo"]
    assert ppo["rollouts"] == 8 and ppo["length"] == ppo["new_tokens"] == 16  # none ended early
    assert ppo["sampling_tokens_per_second"] > 0 and ppo["training_tokens_per_second"] > 0
    # The policy left its reference, and the value function has errors to learn from.
    assert 5 < ppo["entropy"] < math.log(512) and ppo["kl"] != 0 and ppo["value_loss"] > 0
    assert results["best-of-n"]["scoring_tokens_per_second"] > 0
    assert results["merge"]["report"]["verified"] and results["bitdelta"]["bitdelta_seconds"] > 0
    assert 5 < results["peft"]["loss"] < 8


PARTS = """
import os, time

def good(setup): return {"checks": {"difference": (0.1, 0.2)}}
def wrong(setup): return {"checks": {"difference": (0.3, 0.2)}}
def raises(setup): raise ValueError("the kernel\\nrefused")
def hangs(setup): time.sleep(60)
def dies(setup): os.kill(os.getpid(), 9)
def breaks(setup): setup.broken = True; return {"tokens_per_second": 7.0, "peak_gib": 6.6, "predicted_gib": 6.0}
def absent(setup): return {"skipped": "not installed"}
"""
SETUP = """
class Setup:
    def __init__(self, tiny): self.broken = False
    def still_works(self): return not self.broken
"""
NAMES = ("good", "wrong", "raises", "hangs", "dies", "breaks", "absent")


def watched(folder, *words):
    """Run a script with parts that fail in every way. -> the process, and the results."""
    (folder / "parts.py").write_text(PARTS)
    (folder / "gpu_setup.py").write_text(SETUP)
    (folder / "script.py").write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.append({str(BENCHMARKS)!r})
        from pathlib import Path
        import gpu
        gpu.SCRIPT, gpu.IMPORTS = Path(__file__), 2.0
        gpu.PARTS = [gpu.Part(name, f"parts:{{name}}", 0.5) for name in {NAMES!r}]
        sys.exit(gpu.main())
    """)
    )
    out = folder / "out.jsonl"
    command = [sys.executable, str(folder / "script.py"), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": ""})
    return done, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_part_that_fails_ends_nothing_but_itself(tmp_path):
    """It raises, hangs, dies, or breaks the device: the file has what happened, and the next part runs."""
    done, results = watched(tmp_path)
    assert [r["part"] for r in results] == list(NAMES) and done.returncode == 1
    by_name = {r["part"]: r for r in results}
    assert [name for name in NAMES if by_name[name]["ok"]] == ["good", "breaks", "absent"]
    assert by_name["wrong"]["checks"]["difference"] == [0.3, 0.2]
    assert by_name["raises"]["error"] == "ValueError: the kernel" and "parts.py" in by_name["raises"]["traceback"]
    assert (
        by_name["hangs"]["error"].startswith("no end after") and by_name["dies"]["error"] == "the process ended with -9"
    )
    assert "again: python benchmarks/gpu.py" in done.stdout and "--only wrong raises hangs dies" in done.stdout
    assert (
        "| breaks | 7 | 6.6 | 6.0 | +10% |" in done.stdout and "| wrong | NO | difference: 0.3 | 0.2 |" in done.stdout
    )


def test_some_parts_again_and_no_time(tmp_path):
    watched(tmp_path, "--only", "raises")
    done, results = watched(tmp_path, "--only", "good", "absent", "--minutes", "0")
    assert [r["part"] for r in results] == ["raises", "good", "absent"]  # appended
    assert results[2]["error"].startswith("left out: no time")
    assert "raises" not in done.stdout  # the table of this run
    assert "there is no part lola" in watched(tmp_path, "--only", "lola")[0].stderr
