"""One contestant of peers.py in a process of its own: it trains step by step, each when it is told to.

    python benchmarks/contestants.py NAME CASE SHAPE MODEL_FOLDER STEPS CHECKPOINTING ATTENTION

It writes a line of JSON when it is ready and one after each step (CPU seconds, loss, memory), and waits for a line
after each. All train the same LoRA on the same rows with AdamW, a constant learning rate and clipping at 1.

lowalign      the engine and methods of `lowalign`; DPO with the reference's log-probs computed beforehand.
trl           SFTTrainer (padding_free: faster than padded, same loss), DPOTrainer (precompute_ref_log_probs; its
              padding_free is switched off in 1.16) and RewardTrainer, with bf16 autocast. It has no loss for rankings
              and gets each pair of a ranking as a row.
plain         transformers and peft, padded batches and full logits, bf16 autocast; DPO with the reference by
              disable_adapter at each step, rankings as K rows each and the loss of all their pairs.
plain-cached  plain with the reference's log-probs computed beforehand (DPO).
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import BETA, CASES, CLIP, LEARNING_RATE, Settings, lora, make_rows, set_start
from meter import Meter
from stock import run_plain, run_trl
from torch import Tensor

from lowalign import Base, Example, Host
from lowalign.config import TrainConfig
from lowalign.methods.dpo import DPO, reference_logps
from lowalign.methods.reward import Reward
from lowalign.methods.sft import SFT
from lowalign.train.engine import train
from lowalign.training import DPOLossConfig, RewardLossConfig


class Paced:
    """A method whose batches come in order, and wait for the meter."""

    def __init__(self, method, meter: Meter) -> None:
        self.method, self.meter = method, meter
        self.trains, self.totals = method.trains, method.totals

    def batch(self, step: int) -> list[Example]:
        self.meter.step(self.sum) if step else self.meter.ready()
        self.sum, size = 0.0, self.method.batch_size
        return self.method.examples[step * size : (step + 1) * size]

    def loss(self, examples: Sequence[Example], totals: dict) -> tuple[Tensor, dict]:
        loss, metrics = self.method.loss(examples, totals)
        self.sum += loss.item()
        return loss, metrics


def run_lowalign(case: str, folder: Path, rows: list[Example], steps: int, settings: Settings, meter: Meter) -> None:
    """`lowalign sft`, `dpo` or `reward`, from the loaded base on."""
    host, batch = Host(Base.load(folder, quiet=True)), CASES[case].batch
    host.add("policy", lora("CAUSAL_LM"))
    if case == "sft":
        method = SFT(host, rows, ("policy",), batch, seed=0)
    elif case == "dpo":
        for row in rows:
            row.reference = reference_logps(host, (), [row]).tolist()
        method = DPO(host, rows, ("policy",), (), DPOLossConfig(beta=BETA), batch, seed=0)
    else:
        host.add_head("policy")
        method = Reward(host, rows, ("policy",), RewardLossConfig(), batch, seed=0)
    set_start(host.weights("policy").items())
    config = TrainConfig(  # a step is told of when the next begins, so there is one more
        steps=steps + 1, batch_size=batch, learning_rate=LEARNING_RATE, schedule="constant", warmup=0.0, clip=CLIP,
        optimizer="adamw", checkpointing=settings.checkpointing, save_every=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        train(host, Paced(method, meter), config, Path(out))


def main() -> None:
    name, case, shape, folder, steps, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    meter, rows = Meter(), make_rows(case, shape, int(steps))
    contestants = {"lowalign": run_lowalign, "trl": run_trl, "plain": run_plain, "plain-cached": run_plain}
    options = {"cached": True} if name == "plain-cached" else {}
    contestants[name](case, Path(folder), rows, int(steps), Settings(*settings), meter, **options)


if __name__ == "__main__":
    main()
