"""Whether fused layers learn what stock ones do: SFT in the demo's world, 4-bit base in bf16, over seeds.

    python benchmarks/exact.py --out exact --seeds 3 --steps 200

For each seed (data order and initial weights) one run with --base.exact and one without, on the rows of `lowalign demo`.
Prints the held-out loss of each after the last step. Rounding alone separates two runs of a seed, as another order of the rows
does; OUT/exact.json has all figures.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from lowalign import Base
from lowalign.commands.sft import sft
from lowalign.demo import configs as demo
from lowalign.demo.pipeline import held_out_losses

OPTIONS = replace(demo.BASE_CONFIG, dtype="bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True)
    config, losses = demo.stage_config(options.out, "sft"), []
    for exact in (True, False):
        base_config = replace(OPTIONS, exact=exact)
        base = Base.load(demo.BASE, **vars(base_config))
        for seed in range(options.seeds):
            run = options.out / f"{'exact' if exact else 'fused'}-{seed}"
            loop = replace(config.train, steps=options.steps, seed=seed, eval_every=0, save_every=options.steps)
            if sft(replace(config, out=run, base=base_config, train=loop), base):
                raise SystemExit(f"{run} has failed")
            start, end = held_out_losses(run)
            losses.append({"exact": exact, "seed": seed, "start": start, "end": end})
            print(losses[-1], flush=True)
    (options.out / "exact.json").write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
