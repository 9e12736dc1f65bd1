#!/usr/bin/env bash
# Stage one as a job array: images -> token store.
#
#   sbatch --array=0-15 slurm/tokenize.sh config=configs/tokenize/imagenet_f16.yaml \
#       dataset.shards_path_or_url='imagenet/train-{00000..01023}.tar' store.path=stores/imagenet
#
# Arguments go to muse-tokenize. Tasks share the input shards by their number, without talking to
# each other; finished shards are skipped, so the same line mends whatever went wrong. A warning
# before preemption or the time limit abandons the shard in hand and requeues the task. Your site's
# account, partition and GPUs go on the sbatch line or into SBATCH_* variables.
#SBATCH --job-name=muse-tokenize
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/requeue.sh

run_and_requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" \
    srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    "${MUSE_PYTHON:-python}" -m tokenize_stage.encode "$@"
