# Sourced by the job scripts: run_and_requeue JOB COMMAND…
#
# Runs srun in the background, so that bash can answer Slurm's warning (USR1, asked for with
# --signal). The warning goes on to srun, which hands it to the tasks; they save or abandon their
# work and exit with 75, "not finished", and the job is put back into the queue. Never TERM: sent to
# srun it kills the tasks at once, and as a job's own signal it also means scancel.

run_and_requeue() {
    local job=$1 status=0
    shift
    echo "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    "$@" &
    local step=$!
    trap 'echo "warning received"; kill -USR1 "$step"' USR1
    while kill -0 "$step" 2>/dev/null; do
        status=0
        wait "$step" || status=$?
    done
    if ((status == 75)); then
        scontrol requeue "$job"
    fi
    exit "$status"
}
