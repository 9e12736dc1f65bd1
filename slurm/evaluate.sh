#!/usr/bin/env bash
# A trained model's pictures, and what they are worth: muse-generate, then muse-evaluate.
#
#   sbatch slurm/evaluate.sh model=runs/imagenet/model output_dir=runs/imagenet/generated \
#       -- config=configs/evaluate/fashion_mnist.yaml output_dir=runs/imagenet/evaluation
#   sbatch --dependency=afterok:JOB slurm/evaluate.sh …      (after the training job)
#
# Arguments before -- go to muse-generate, those after it to muse-evaluate, which is told the folder
# of the pictures; without -- pictures are all. A job that is put back starts from the beginning.
#SBATCH --job-name=muse-evaluate
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/requeue.sh

folder=''
generate=()
while (($#)) && [[ $1 != -- ]]; do
    [[ $1 == output_dir=* ]] && folder=${1#output_dir=}
    generate+=("$1")
    shift
done
run() { srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "${MUSE_PYTHON:-python}" -m "$@"; }

run train_stage.generate "${generate[@]}"
if (($#)); then
    run train_stage.evaluate "generated=$folder" "${@:2}"
fi
