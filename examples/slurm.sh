#!/bin/bash
# Two machines with four cards each: sbatch examples/slurm.sh
#SBATCH --job-name=lowalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120        # two minutes before the end: save and stop
#SBATCH --requeue                # the same command goes on: --resume starts a run where there is none
set -euo pipefail

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
  -m lowalign sft lora/sft --model "$MODEL" --data "$DATA" --out "$OUT" --resume
