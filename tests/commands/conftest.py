"""The small base trained on real text by examples/small_base.py, made once and cached."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 150


def some_of(cases: Iterable[tuple], quick: Collection[tuple]) -> list:
    """All cases as pytest's parameters; those that are not in `quick` run with the slow tests."""
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in cases]


@pytest.fixture(scope="session")
def small_base(shared: Path) -> Path:
    """Its folder. It is made again only when the script changes."""
    script = ROOT / "examples" / "small_base.py"
    key = hashlib.sha256(script.read_bytes() + str(STEPS).encode()).hexdigest()[:12]
    folder = ROOT / ".cache" / f"small-base-{key}"
    if not (folder / "config.json").exists():
        command = [sys.executable, script, "--data", shared / "data", "--out", folder, "--steps", str(STEPS)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder
