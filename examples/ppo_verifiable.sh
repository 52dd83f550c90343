#!/usr/bin/env bash
# PPO with a verifiable reward and without a value function (GRPO): sums, on one 24 GB card.
#
#   examples/ppo_verifiable.sh [OUT]
#
# Run it again after an interruption: it resumes from the last checkpoint.
set -euo pipefail

here=$(dirname "$0")
out=${1:-runs/ppo-verifiable}
base=${BASE:-Qwen/Qwen2.5-7B-Instruct} # an instruction model, whose answers end; with a plain base, start from an SFT run (--init)

# 1. The questions: two thousand sums of four numbers.
mkdir -p "$out"
python "$here/ppo_verifiable.py" "$out/prompts.jsonl"

# 2. Train. The questions are turns of the user (prompt-format chat). 8 answers to each; the advantage of one is its reward
#    against the others. The KL penalty is a term of the loss, and each round is used for one epoch, as in arXiv 2402.03300.
lowalign ppo lora/ppo --model "$base" --data "$out/prompts.jsonl" --out "$out/ppo" \
    --reward "$here/ppo_verifiable.py:correct" \
    --data.prompt-format chat --ppo.advantage group --rollout.samples 8 --ppo.epochs 1 --ppo.kl 0.04 \
    --sampling.max-new-tokens 256 --train.learning-rate 2e-5 --train.save-every 2 --resume

# 3. Try it. `reward` in metrics.jsonl is the share of correct answers; samples.jsonl has some answers.
lowalign generate --model "$base" --adapter "$out/ppo" --prompt "What is 4096 + 1905 + 27 + 88123?"
