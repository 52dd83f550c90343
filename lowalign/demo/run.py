"""`lowalign demo`: align a small base in a tiny world, and measure what each stage gained by the world's exact score."""

import tempfile
from pathlib import Path

PLAN = """\
A small base is loaded in 4 bit and aligned: SFT, reward model, best-of-n, DPO, PPO, each measured on held-out prompts.
The DPO policy is then merged into a plain model. All of it takes about two minutes of CPU time on one core.
Importing torch …"""


def main() -> int:
    """Run the demo. Returns the exit code."""
    print(PLAN, flush=True)  # before the imports, which take seconds
    from lowalign.demo.pipeline import run_stages

    return run_stages(Path(tempfile.mkdtemp(prefix="lowalign-demo-")))
