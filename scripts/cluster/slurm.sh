#!/usr/bin/env bash
# A real SLURM over the two hosts of hosts.sh: controller on n1, one node on each. Needs Debian's slurm-wlm and munge, and root.
#   slurm.sh up FOLDER | down FOLDER
set -euo pipefail
for program in slurmctld slurmd munged; do
    command -v "$program" >/dev/null || { echo "$0: there is no $program here; install slurm-wlm and munge" >&2 && exit 1; }
done
hosts="$(dirname "$0")/hosts.sh"
folder="$(realpath -m "${2:?slurm.sh up|down FOLDER}")"
export SLURM_CONF="$folder/slurm.conf"
case "$1" in
up)
    mkdir -p "$folder/state" /run/munge /var/log/munge
    [ -s /etc/munge/munge.key ] || (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chown -R munge:munge /run/munge /var/log/munge /etc/munge
    pgrep -x munged >/dev/null || su -s /bin/sh munge -c munged
    cat >"$SLURM_CONF" <<END
ClusterName=two
SlurmctldHost=n1(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/slurmd.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
KillWait=30
SlurmdParameters=config_overrides
MinJobAge=600
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname=n1 NodeAddr=10.77.0.1 CPUs=1
NodeName=n2 NodeHostname=n2 NodeAddr=10.77.0.2 CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    "$hosts" run n1 slurmctld -c
    "$hosts" run n1 slurmd -N n1
    "$hosts" run n2 slurmd -N n2
    for _ in $(seq 60); do
        [ "$("$hosts" run n1 sinfo --noheader --Node --format=%t 2>/dev/null | grep -cx idle)" = 2 ] && exit 0
        sleep 0.5
    done
    "$hosts" run n1 sinfo >&2 || true
    exit 1
    ;;
down)
    for name in slurmd.n1 slurmd.n2 slurmctld; do
        [ -f "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
    ;;
esac
