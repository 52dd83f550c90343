#!/usr/bin/env bash
# PPO with a reward that can be checked, and without a value function (GRPO): sums, on one 24 GB card.
#
#   examples/ppo_verifiable.sh [OUT]
#
# Run it again after an interruption: it goes on from the last checkpoint.
set -euo pipefail

here=$(dirname "$0")
out=${1:-runs/ppo-verifiable}
base=${BASE:-Qwen/Qwen2.5-7B-Instruct} # its answers end; begin with an SFT run (--init) where the base's do not

# 1. The questions: two thousand sums of four numbers.
mkdir -p "$out"
python "$here/ppo_verifiable.py" "$out/prompts.jsonl"

# 2. Train. 8 answers to each question: what is learned from is by how much one beats the others. The pull to the
#    reference is a term of the loss, and a round is used once, as in arXiv 2402.03300.
resume=$([ -d "$out/ppo/checkpoints" ] && echo --resume || true)
lowalign ppo lora/ppo --model "$base" --data "$out/prompts.jsonl" --out "$out/ppo" \
    --reward "$here/ppo_verifiable.py:correct" \
    --ppo.advantage group --rollout.samples 8 --ppo.epochs 1 --ppo.kl-in loss --ppo.kl 0.04 \
    --sampling.max-new-tokens 256 --train.learning-rate 2e-5 --train.save-every 2 $resume

# 3. Ask it something. `reward` in metrics.jsonl is the share of right answers, samples.jsonl has some of them.
lowalign generate --model "$base" --adapter "$out/ppo" --prompt "What is 4096 + 1905 + 27 + 88123?"
