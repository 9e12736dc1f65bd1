#!/usr/bin/env bash
# Stage two on one node or many: token store -> transformer.
#
#   sbatch slurm/train_transformer.sh                     (the demo's model, from `make demo`'s store)
#   sbatch slurm/train_transformer.sh config=configs/train/imagenet.yaml dataset.train_store=…
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 slurm/train_transformer.sh config=…
#
# Arguments go to muse-train; one task a GPU. A warning before preemption or the time limit saves a
# checkpoint and requeues the job, which goes on from it. Your site's account, partition and GPUs go
# on the sbatch line or into SBATCH_* variables.
#SBATCH --job-name=muse-train
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/requeue.sh

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
(($#)) || set -- "config=${MUSE_TRAIN_CONFIG:-configs/train/fashion_mnist.yaml}"
export MASTER_ADDR=${MUSE_MASTER_ADDR:-$first} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# srun starts one Python a task; these four names are what torch.distributed reads
# shellcheck disable=SC2016  # expanded in each task, not here
run_and_requeue "$SLURM_JOB_ID" 0 \
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --label bash -c '
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        export LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[(,]*}
        exec "$@"' task "${MUSE_PYTHON:-python}" -m train_stage.train \
    experiment.grace_s=150 "$@"  # it saves half a minute before the end at the latest
