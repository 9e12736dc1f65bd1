#!/usr/bin/env bash
# Stage one, and two if wanted, as jobs that wait for each other: plan -> array -> seal -> train.
#
#   slurm/submit_pipeline.sh --tasks 64 config=configs/tokenize/imagenet_f16.yaml \
#       dataset.shards_path_or_url='imagenet/train-{00000..01023}.tar' store.path=stores/imagenet \
#       -- config=configs/train/imagenet.yaml experiment.output_dir=runs/imagenet
#
#   --tasks N         array tasks at most (64); no more than there are input shards
#   --processes P     processes in each, one a GPU (1)
#   --at-once M       array tasks that may run at the same time (all)
#   --only-missing, --only-failed    of the input shards
#   --partial         seal (and train) even if shards are missing
#   --logs DIR        folder of the logs (logs)
#   --dry-run         print the sbatch lines, submit nothing
#
# Run it in the folder of the repository. The plan is made at once, here. key=value words go to
# muse-tokenize; store.path must be among them. What follows -- goes to muse-train, which otherwise
# is not submitted. MUSE_TOKENIZE_SBATCH, MUSE_SEAL_SBATCH and MUSE_TRAIN_SBATCH are further words
# for sbatch (--gpus-per-node=8 --time=8:00:00); like account and partition (SBATCH_ACCOUNT,
# SBATCH_PARTITION) they come from the environment or from slurm/site.env.
set -euo pipefail

refuse() { echo "error: $*" >&2; exit 2; }

read_arguments() {
    tasks=64 processes=1 at_once='' logs=logs only=() partial=() dry_run='' words=() train=() store=''
    while (($#)); do
        case $1 in
        --tasks | --processes | --at-once)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || refuse "$1 ${2:-}: a number from 1 on"
            local name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift
            ;;
        --logs) logs=${2:?} && shift ;;
        --only-missing | --only-failed) only=("$1") ;;
        --partial) partial=("$1") ;;
        --dry-run) dry_run=yes ;;
        --) shift && train=("$@") && break ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        *=*) words+=("$1") && if [[ $1 == store.path=* ]]; then store=${1#*=}; fi ;;
        *) refuse "$1: neither an option (see --help) nor key=value" ;;
        esac
        shift
    done
    [[ $store ]] || refuse "store.path= is missing"
}

muse_tokenize() { "${MUSE_PYTHON:-python}" -m tokenize_stage.cli "$@"; }

# array_size: as many tasks as asked for, as there is work for, as Slurm allows
array_size() {
    local size=$tasks allowed shards work
    if [[ ! $dry_run ]]; then
        shards=$("${MUSE_PYTHON:-python}" -c 'import sys; from pathlib import Path
from tokenize_stage.work.plan import read_plan; print(len(read_plan(Path(sys.argv[1]))))' "$store")
        work=$(((shards + processes - 1) / processes))
        size=$((work < size ? work : size))
    fi
    allowed=$(scontrol show config | awk '$1 == "MaxArraySize" { print $3 }')
    echo $((allowed < size ? allowed : size))
}

submit() {  # submit NAME WORD…: sets NAME to the id of the job
    printf '%q ' sbatch --parsable "${@:2}" && echo
    local id="<$1>"
    if [[ ! $dry_run ]]; then id=$(sbatch --parsable "${@:2}"); fi
    printf -v "$1" %s "${id%%;*}"
    ids+=("${!1}")
}

read_arguments "$@"
[[ -f slurm/requeue.sh ]] || refuse "run this in the folder of the repository"
source slurm/requeue.sh
if [[ ! $dry_run ]]; then
    mkdir -p "$logs"
    muse_tokenize plan "${only[@]}" "${words[@]}"
fi
size=$(array_size) array='' seal='' ids=() after=()
# the variables with options are split into words on purpose
# shellcheck disable=SC2086
{
    if ((size)); then
        submit array --array="0-$((size - 1))${at_once:+%$at_once}" --ntasks-per-node="$processes" \
            --output="$logs/tokenize-%A_%a.out" ${MUSE_TOKENIZE_SBATCH:-} \
            slurm/tokenize_array.sh "${words[@]}"
        after=(--dependency="afterany:$array")
    fi
    submit seal "${after[@]}" --output="$logs/seal-%j.out" ${MUSE_SEAL_SBATCH:-} \
        slurm/seal.sh "$store" "${partial[@]}"
    if ((${#train[@]})); then
        submit train --dependency="afterok:$seal" --kill-on-invalid-dep=yes \
            --output="$logs/train-%j.out" ${MUSE_TRAIN_SBATCH:-} \
            slurm/train_transformer.sh dataset.train_store="$store" "${train[@]}"
    fi
}
if [[ ! $dry_run ]]; then
    echo "jobs ${ids[*]}; logs in $logs"
    echo "watch: muse-tokenize status $store --watch 60; squeue -j $(IFS=, && echo "${ids[*]}")"
fi
