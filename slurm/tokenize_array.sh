#!/usr/bin/env bash
# Stage one as a job array: images -> token store. submit_pipeline.sh submits it, or by hand:
#
#   sbatch --array=0-15 --gpus-per-node=1 slurm/tokenize_array.sh \
#       config=configs/tokenize/imagenet_f16.yaml \
#       dataset.shards_path_or_url='imagenet/train-{00000..01023}.tar' store.path=stores/imagenet
#
# Arguments go to muse-tokenize. A task is one process with one GPU, or a node:
# --ntasks-per-node=8 --gpus-per-node=8. All processes of all tasks share the input shards by their
# number, without talking to each other; finished shards are skipped, so the same line mends
# whatever went wrong. A warning before preemption or the time limit abandons the shard in hand and
# requeues the task; so does a crash, MUSE_RETRIES times as long as no shard gets finished.
#SBATCH --job-name=muse-tokenize
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/requeue.sh

# one process that fails does not end its neighbours, whose shards are others
run_and_requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" "${MUSE_RETRIES:-2}" \
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0 \
    "${MUSE_PYTHON:-python}" -m tokenize_stage.cli encode "$@"
