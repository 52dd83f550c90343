"""One contestant of peers.py in a process of its own. It trains one step at a time, on request.

    python benchmarks/contestants.py NAME CASE SHAPE MODEL_FOLDER STEPS CHECKPOINTING ATTENTION

It writes a line of JSON when it is ready and after each step (CPU seconds, loss, memory), and then waits for a line. All train the same LoRA on the same rows with AdamW, a constant learning rate and clipping at 1.

lowalign      the engine and methods of `lowalign`; DPO with the reference's log-probs computed beforehand.
trl           SFTTrainer (padding_free: faster than padded, same loss), DPOTrainer (precompute_ref_log_probs; its
              padding_free is switched off in 1.16) and RewardTrainer, with bf16 autocast. It has no loss for rankings
              and gets each pair of a ranking as a row.
lowalign-exact, lowalign-lora, lowalign-compiled
              with stock LoRA layers, norms, rotary embeddings and MLPs (--base.exact); with LoRA layers fused alone; with
              norms, rotary embeddings and MLPs compiled too (--base.compile on).
plain         transformers and peft, padded batches and full logits, bf16 autocast; DPO with the reference by
              disable_adapter at each step, rankings as K rows each and the loss of all their pairs.
plain-cached  plain with the reference's log-probs computed beforehand (DPO).

In the case ppo a step is a round with all its optimizer steps, between lowalign (policy, value and reward are LoRAs on
one base) and trl (stock_ppo.py).
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from cases import BETA, CASES, CLIP, LEARNING_RATE, ROUNDS, Settings, lora, make_prompts, make_rows, set_start
from meter import Meter
from stock import run_plain, run_trl
from torch import Tensor

from lowalign import Base, Example, Host
from lowalign.config.sections import Sampling, TrainConfig
from lowalign.config.training import DPOLossConfig, PPOConfig, PPOLossConfig, RewardLossConfig, RolloutConfig
from lowalign.methods.dpo import DPO
from lowalign.methods.ppo import PPO
from lowalign.methods.ppo_round import Roles
from lowalign.methods.reward_model import RewardModel
from lowalign.methods.sft import SFT
from lowalign.rewards.reward_run import score_examples
from lowalign.train.engine import train


class Paced:
    """A method that waits for the meter before every `every` steps."""

    def __init__(self, method, meter: Meter, every: int = 1) -> None:
        self.method, self.meter, self.every = method, meter, every
        self.lr_multipliers, self.normalizers = method.lr_multipliers, method.normalizers
        self.epoch = method.epoch

    def batch(self, step: int) -> list[Example]:
        if step % self.every == 0:
            self.meter.step(self.sum / self.every) if step else self.meter.ready()
            self.sum = 0.0
        return self.examples(step)

    def examples(self, step: int) -> list[Example]:
        return self.method.batch(step)

    def loss(self, examples: Sequence[Example], normalizers: dict) -> tuple[Tensor, dict]:
        loss, metrics = self.method.loss(examples, normalizers)
        self.sum += loss.item()
        return loss, metrics


class PacedInOrder(Paced):
    """Its batches are the rows in order."""

    def examples(self, step: int) -> list[Example]:
        size = self.method.train.batch_size
        return self.method.examples[step * size : (step + 1) * size]


def load_base(folder: Path, variant: str) -> Base:
    """The base, with the parts fused that a name of ours means."""
    compile = "on" if variant == "lowalign-compiled" else "auto"
    base = Base.load(folder, exact=variant in ("lowalign-exact", "lowalign-lora"), compile=compile, quiet=True)
    base.exact = variant == "lowalign-exact"
    return base


def run_lowalign(
    case: str,
    folder: Path,
    rows: list[Example],
    steps: int,
    settings: Settings,
    meter: Meter,
    variant: str = "lowalign",
) -> None:
    """`lowalign sft`, `dpo` or `reward`, from the loaded base on."""
    host, config = Host(load_base(folder, variant)), loop(steps, CASES[case].batch, CLIP, settings)
    host.add("policy", lora("CAUSAL_LM"))
    if case == "sft":
        method = SFT(host, rows, ("policy",), config)
    elif case == "dpo":
        method = DPO(host, rows, ("policy",), (), DPOLossConfig(beta=BETA), config)
        for row in rows:
            row.reference = method.reference_logps([row]).tolist()
    else:
        host.add_scalar_head("policy")
        method = RewardModel(host, rows, ("policy",), RewardLossConfig(), config)
    set_start(host.weights("policy").items())
    with tempfile.TemporaryDirectory() as out:
        train(host, PacedInOrder(method, meter), config, Path(out))


def run_lowalign_ppo(
    shape: str, folder: Path, prompts: list[list[int]], settings: Settings, meter: Meter, variant: str = "lowalign"
) -> None:
    """`lowalign ppo`, from the loaded base on; the settings equal those of trl."""
    host, r = Host(load_base(folder, variant)), ROUNDS[shape]
    for role in ("policy", "value", "reward"):
        host.add(role, lora("CAUSAL_LM"))
        if role == "reward":
            host.add_scalar_head(role)
        set_start(host.weights(role).items())
    host.add_scalar_head("value", zero=True)
    steps = len(prompts) // r.batch * r.steps
    config = PPOConfig(
        model="", out=Path(), train=loop(steps, r.minibatch, 0.0, settings), ppo=PPOLossConfig(epochs=r.epochs),
        sampling=Sampling(max_new_tokens=r.new, min_new_tokens=r.new, max_rows=r.batch * r.samples),
        rollout=RolloutConfig(prompts=r.batch, samples=r.samples, missing_eos="keep"),
    )  # fmt: skip

    def score(numbers: Sequence[int], completions: list[list[list[int]]]) -> list[list[float]]:
        examples = [Example(prompts[i], group) for i, group in zip(numbers, completions, strict=True)]
        return score_examples(host, ("reward",), examples)

    method = PPO(host, Roles(("policy",), (), ("value",)), prompts, score, config)
    with tempfile.TemporaryDirectory() as out:
        train(host, Paced(method, meter, r.steps), config.train, Path(out))


def loop(steps: int, batch: int, clip: float, settings: Settings) -> TrainConfig:
    """One step more than measured: a step is reported when the next one begins."""
    return TrainConfig(
        steps=steps + 1, batch_size=batch, learning_rate=LEARNING_RATE, schedule="constant", warmup=0.0, clip=clip,
        optimizer="adamw", checkpointing=settings.checkpointing, save_every=steps + 2,
    )  # fmt: skip


def main() -> None:
    name, case, shape, folder, steps, *settings = sys.argv[1:]
    torch.set_num_threads(1)
    if case == "ppo":
        if name == "trl":
            from stock_ppo import run_trl_ppo as run
        else:
            run = partial(run_lowalign_ppo, variant=name)
        return run(shape, Path(folder), make_prompts(shape, int(steps)), Settings(*settings), Meter())
    meter, rows = Meter(), make_rows(case, shape, int(steps))
    contestants = {"trl": run_trl, "plain": run_plain, "plain-cached": run_plain}
    if name.startswith("lowalign"):
        return run_lowalign(case, Path(folder), rows, int(steps), Settings(*settings), meter, variant=name)
    options = {"cached": True} if name == "plain-cached" else {}
    contestants[name](case, Path(folder), rows, int(steps), Settings(*settings), meter, **options)


if __name__ == "__main__":
    main()
