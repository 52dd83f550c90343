#!/usr/bin/env bash
# A full fine-tune of a 7B base as one bit a weight: compressed, its scales distilled, tried, made a plain model again.
#
#   examples/bitdelta.sh rows.jsonl [OUT]
#
# rows.jsonl: a few hundred rows of text or chats like those the fine-tune is used for. Run it again after an
# interruption: it resumes. The fine-tuned model is run once in 16 bit (15 GB), before the base is loaded in 4 bit.
set -euo pipefail

data=${1:?usage: bitdelta.sh ROWS.jsonl [OUT]}
out=${2:-runs/bitdelta}
base=${BASE:-Qwen/Qwen2.5-7B}
finetuned=${FINETUNED:-Qwen/Qwen2.5-7B-Instruct}

# 1. Compress: signs and scales, streamed a tensor at a time; no GPU needed. Prints the size against the model's and a LoRA's.
[ -d "$out/compressed" ] || lowalign bitdelta compress --base "$base" --finetuned "$finetuned" --out "$out/compressed"

# 2. Distil the scales. Prints KL and loss before and after.
lowalign bitdelta distil bitdelta/distil --model "$base" --delta "$out/compressed" --finetuned "$finetuned" \
    --data "$data" --out "$out/distilled" --resume

# 3. Try it: an adapter on the 4-bit base, like a LoRA.
lowalign generate --model "$base" --adapter "$out/distilled" --prompt "In one sentence: what is a good way to start the day?"

# 4. A plain model of it, compared with the delta before it is kept.
[ -d "$out/merged" ] || lowalign merge "$out/distilled" --out "$out/merged"
