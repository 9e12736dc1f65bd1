#!/usr/bin/env bash
# A real Slurm on this machine, for tests of job scripts: munged, slurmctld and two slurmd, each on
# another port of this host. Needs Debian's slurm-wlm and munge, neither systemd nor cgroups.
#
#   cluster.sh start DIR        starts what does not run yet, waits until both nodes are usable
#   cluster.sh crash DIR NODE   kills all that runs on node1 or node2 at once; `start` mends it
#   cluster.sh stop DIR         ends jobs and daemons, deletes DIR, in which all state is
#
# In between, SLURM_CONF=DIR/slurm.conf points sbatch, squeue, scancel, scontrol at it. Nodes claim
# CPUs and GPUs that are not there (/dev/null); nothing is enforced.
set -euo pipefail
usage="usage: cluster.sh start|stop DIR | crash DIR NODE"
action=${1:?$usage} dir=$(realpath -m "${2:?$usage}") conf=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
((${#dir} <= 80)) || { echo "too long for the path of a socket: $dir" >&2; exit 2; }

# The processes of this cluster at a place: node1, node2, controller, munge, or at all of them.
pids() {
    grep -lzFx "SLURM_CONF=$conf" /proc/[0-9]*/environ 2>/dev/null |
        xargs -r grep -lzE "^SLURMD_NODENAME=${1:-.*}$" 2>/dev/null | cut -d/ -f3 || true
}

kill_all() {  # again, until nothing that was started meanwhile is left
    local left
    for _ in {1..50}; do
        left=$(pids "${1:-}")
        [[ $left ]] || return 0
        xargs kill -KILL <<<"$left" 2>/dev/null || true
        sleep 0.1
    done
    echo "still running: $left" >&2
    return 1
}

launch() {  # launch PLACE DAEMON [OPTION…], unless it runs there
    local pid
    for pid in $(pids "$1"); do
        if [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]]; then return; fi
    done
    env -i PATH="$PATH" SLURM_CONF="$conf" SLURMD_NODENAME="$1" "${@:2}" \
        </dev/null >>"$dir/log/start.log" 2>&1
}

free_ports() {  # the first of three ports that nobody listens to
    local port first
    for ((first = 17000 + $$ % 1000 * 10; ; first += 10)); do
        for ((port = first; port < first + 3; port++)); do
            if (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
        done
        echo "$first"
        return
    done
}

# cred_expire is how long a requeued job waits, SlurmdTimeout after how long a silent node is lost,
# KillWait the time from TERM to KILL: 120, 300 and 30 s on a real cluster. MinJobAge keeps finished
# jobs visible.
configure() {
    local host port
    host=$(uname -n) host=${host%%.*} port=$(free_ports)
    head -c 128 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    ln -s /dev/null "$dir/nvidia0"
    ln -s /dev/null "$dir/nvidia1"
    echo "Name=gpu File=$dir/nvidia[0-1]" >"$dir/gres.conf"
    cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
MinJobAge=86400
ReturnToService=2
MaxArraySize=101
GresTypes=gpu
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=32 Gres=gpu:2
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=32 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
CONF
}

start() {
    mkdir -p "$dir"/{munge,state,log}
    chmod 755 "$dir" "$dir/munge"
    [[ -f $conf ]] || configure
    export SLURM_CONF=$conf
    launch munge munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
        --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/log/munged.log"
    launch controller slurmctld
    for node in node1 node2; do launch "$node" slurmd -N "$node"; done
    for _ in {1..150}; do
        if (($(sinfo -hNo %t 2>/dev/null | grep -cE '^(idle|mix|alloc|comp)$') == 2)); then return; fi
        sleep 0.2
    done
    tail -n 20 "$dir"/log/* >&2
    return 1
}

case $action in
start) start ;;
crash) kill_all "${3:?$usage}" ;;
stop) kill_all && rm -rf "$dir" ;;
*) echo "$usage" >&2 && exit 2 ;;
esac
