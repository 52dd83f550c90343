"""`lowalign demo`: align a small base in a tiny world, and measure what each stage gained by the world's exact score."""

import tempfile
from pathlib import Path

PLAN = """\
A small base is loaded in 4 bit and aligned by the pipeline pipelines/demo: SFT, reward model, best-of-n, DPO, PPO, and the
DPO policy merged into a plain model. Each policy is then measured on held-out prompts. All of it takes about two minutes of CPU time on one core.
Importing torch …"""


def main() -> int:
    """Run the demo. Returns the exit code."""
    print(PLAN, flush=True)  # before the imports, which take seconds
    from lowalign.demo.pipeline import run_demo

    return run_demo(Path(tempfile.mkdtemp(prefix="lowalign-demo-")))
