# shellcheck shell=bash
# Sourced by the job scripts, in the folder of the repository: the settings of the site, and
# run_and_requeue JOB RETRIES COMMAND…
#
# COMMAND (srun) runs in the background, so that bash can answer Slurm's warning (USR1, asked for
# with --signal). The warning goes on to srun, which hands it to the tasks; they save or abandon
# their work and exit with 75, "not finished", and the job is put back into the queue. Never TERM:
# sent to srun it kills the tasks at once, and as a job's own signal it also means scancel.
#
# 0 is done, 2 refused, 3 done but for inputs that cannot be read, 76 replaced by a newer job in the
# same run directory: trying again helps with none of them. Every other status is a crash, which is
# tried again RETRIES times; a shard that got finished in between gives the whole number back. Which
# were crashes, and how much there was to do before each ("task … to do"), is read from the job's own
# log.

if [[ -f ${MUSE_SITE=slurm/site.env} ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$MUSE_SITE"
    set +a
fi
export PYTHONUNBUFFERED=1  # what was printed is in the log, whatever ended the program

warned='' step=''
trap 'warned=yes again=yes; echo "warning received"; kill -USR1 $step 2>/dev/null || true' USR1

run_and_requeue() {
    local job=$1 retries=$2 status=127 code again crashes
    shift 2
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    "$@" &
    step=$!
    if [[ $warned ]]; then kill -USR1 "$step" 2>/dev/null || true; fi
    while true; do  # the warning interrupts a wait, whose status is then not the step's
        again='' code=0
        wait "$step" || code=$?
        ((code == 127)) || status=$code  # 127: waited for already
        [[ $again ]] || break
    done
    # warned before it could listen (USR1), or by the first task to leave with 75 (TERM)
    if ((status == 138 || status == 143)) && [[ $warned ]]; then status=75; fi
    case $status in
    0 | 2 | 3 | 76) ;;
    75) requeue "$job" ;;
    *)
        echo "crashed with status $status"
        crashes=$(crashes_in_a_row)
        if ((crashes <= retries)); then
            requeue "$job"
        elif ((retries)); then
            echo "giving up: $crashes crashes in a row, and no shard finished in between"
        fi
        ;;
    esac
    exit "$status"
}

requeue() {
    scontrol requeue "$1" || echo "job $1 could not be put back into the queue: submit it again"
}

# Crashes since the work left to do last became less, this one included; many where nothing is known
crashes_in_a_row() {
    local log
    log=$(readlink "/proc/$$/fd/1")
    [[ -f $log ]] || { echo 1000000 && return; }
    awk '/^job .*, start / { left = "" }
        /^task .* to do$/ { left += $(NF - 2) }
        /^crashed with status/ {
            row = (left != "" && before != "" && left < before) ? 1 : row + 1
            if (left != "") before = left
        }
        END { print row + 0 }' "$log"
}
