#!/usr/bin/env bash
# From rows to a trained adapter: a 7B base on one 24 GB card.
#
#   examples/sft_7b_24gb.sh rows.jsonl [runs/my-run]
#
# Run it again after an interruption: it resumes from the last checkpoint.
set -euo pipefail

data=${1:?usage: sft_7b_24gb.sh ROWS.jsonl [RUN]}
run=${2:-runs/sft-7b}
base=${BASE:-Qwen/Qwen2.5-7B} # BASE=meta-llama/Llama-3.1-8B for another one

# 1. Check the machine. The script stops here if something necessary is missing.
lowalign doctor

# 2. Check the rows: their format, what is dropped, which tokens are supervised. Read this before training.
lowalign data check "$data" --model "$base"

# 3. Train. 100 rows are held out; the weights with the lowest loss on them are kept beside the newest checkpoints.
#    --train.token-budget is the number of tokens on the card at a time; it changes no result.
lowalign sft lora/sft --model "$base" --data "$data" --out "$run" \
    --data.eval-rows 100 --train.eval-every 100 \
    --train.epochs 2 --train.learning-rate 2e-4 --train.token-budget 8192 --resume

# 4. Try it, with the adapter and without.
question="In one sentence: what is a good way to start the day?"
lowalign generate --model "$base" --adapter "$run" --prompt "$question"
lowalign generate --model "$base" --prompt "$question"

echo "The adapter is in $run/adapter; peft.PeftModel.from_pretrained loads it."
