#!/usr/bin/env bash
# From an SFT run and preferences to a preference-tuned 7B on one 24 GB card, by DPO and by best-of-n.
#
#   examples/preferences_7b_24gb.sh PREFS.jsonl SFT_RUN [OUT]
#
# SFT_RUN is the output of examples/sft_7b_24gb.sh. Run it again after an interruption: every step resumes.
set -euo pipefail

prefs=${1:?usage: preferences_7b_24gb.sh PREFS.jsonl SFT_RUN [OUT]}
sft=${2:?usage: preferences_7b_24gb.sh PREFS.jsonl SFT_RUN [OUT]}
out=${3:-runs/preferences-7b}
base=${BASE:-Qwen/Qwen2.5-7B}

# 1. Check the rows: pairs, rankings, scores or votes; what is dropped, and why.
lowalign data check "$prefs" --model "$base"

# 2. DPO on top of the SFT run, which is frozen and is the reference.
lowalign dpo lora/dpo --model "$base" --data "$prefs" --init "$sft" --out "$out/dpo" \
    --data.eval-rows 100 --train.token-budget 8192 --resume

# 3. A reward model from the same rows, on the same frozen SFT run.
lowalign reward lora/reward --model "$base" --data "$prefs" --init "$sft" --out "$out/reward" \
    --data.eval-rows 200 --train.token-budget 8192 --resume

# 4. The best of 8 answers of the DPO policy to each prompt, by that reward model: rows for sft, pairs for dpo.
lowalign best-of-n lora/best_of_n --model "$base" --adapter "$out/dpo" --reward "$out/reward" --data "$prefs" \
    --out "$out/best-of-8" --n 8 --resume

# 5. Try the policy.
lowalign generate --model "$base" --adapter "$out/dpo" --prompt "In one sentence: what is a good way to start the day?"
echo "The adapter is in $out/dpo/adapter, best-of-8 answers are in $out/best-of-8/best.jsonl."
