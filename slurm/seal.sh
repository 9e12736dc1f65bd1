#!/usr/bin/env bash
# Closes a token store when all its shards are there, after the job array that makes them:
#
#   sbatch --dependency=afterany:ARRAY_JOB slurm/seal.sh stores/imagenet
#
# Arguments go to `muse-tokenize seal`. afterany, as the store decides and not exit statuses. When
# shards are missing the job fails, says which and what to run next, and nothing that waits for it
# with afterok starts. --partial seals what is there.
#SBATCH --job-name=muse-seal
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/requeue.sh

status=0
"${MUSE_PYTHON:-python}" -m tokenize_stage.cli seal "$@" || status=$?
if ((status == 1)); then
    echo "or on this cluster: slurm/submit_pipeline.sh --only-missing" \
        "config=$1/work/config.yaml store.path=$1"
fi
exit "$status"
