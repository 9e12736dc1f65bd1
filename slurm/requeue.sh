# Sourced by the job scripts: run_and_requeue JOB COMMAND…
#
# Runs srun in the background, so that bash can answer Slurm's warning (USR1, asked for with
# --signal). The warning goes on to srun, which hands it to the tasks; they save or abandon their
# work and exit with 75, "not finished", and the job is put back into the queue. Never TERM: sent to
# srun it kills the tasks at once, and as a job's own signal it also means scancel.

run_and_requeue() {
    local job=$1 status=127 code warned
    shift
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    "$@" &
    local step=$!
    trap 'warned=yes; echo "warning received"; kill -USR1 "$step" 2>/dev/null || true' USR1
    while true; do  # the warning interrupts a wait, whose status is then not the step's
        warned='' code=0
        wait "$step" || code=$?
        ((code == 127)) || status=$code  # 127: waited for already
        [[ $warned ]] || break
    done
    if ((status == 75)); then
        scontrol requeue "$job"
    fi
    exit "$status"
}
