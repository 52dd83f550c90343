"""What a contestant of peers.py tells of its steps."""

import json
import os
import sys
import time
from pathlib import Path

import torch


class Meter:
    """Tells the parent of each step, and waits for its word to go on."""

    def __init__(self) -> None:
        self.parent = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is not for the parent

    def ready(self) -> None:
        """All is loaded; the first step can begin. Peak memory is counted from here."""
        Path("/proc/self/clear_refs").write_text("5")
        self._tell(threads=torch.get_num_threads())

    def step(self, loss: float) -> None:
        """A step is done."""
        self._tell(cpu=time.process_time() - self.since, loss=loss)

    def _tell(self, **told: float) -> None:
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        memory = {"rss": int(status["VmRSS"].split()[0]) // 1024, "peak": int(status["VmHWM"].split()[0]) // 1024}
        print(json.dumps(told | memory), file=self.parent, flush=True)
        if sys.stdin.readline() != "step\n":
            sys.exit()
        self.since = time.process_time()
