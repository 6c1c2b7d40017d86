#!/usr/bin/env bash
# A real SLURM of two nodes, n1 and n2, on one Debian or Ubuntu machine, as root and for tests only:
# there is no authentication.
#
#   apt-get install slurmctld slurmd slurm-client
#   tests/slurm/cluster.sh start DIR     the daemons' files and logs go to DIR
#   SLURM_CONF=DIR/slurm.conf sinfo
#   tests/slurm/cluster.sh stop DIR
set -euo pipefail

action=$1
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf

case $action in
  start)
    cores=$(nproc)
    mkdir -p "$dir"/{state,n1,n2}
    # jax asks the name service for the first node's address.
    grep -q '^127.0.0.1 n1 n2$' /etc/hosts || echo '127.0.0.1 n1 n2' >> /etc/hosts
    cat > "$SLURM_CONF" << END
ClusterName=vitcls
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CryptoType=crypto/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
BatchStartTimeout=1
JobRequeue=1
JobFileAppend=1
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=$cores State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
END
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
      if [ "$(sinfo --noheader --format=%D --states=idle 2> /dev/null)" = 2 ]; then exit 0; fi
      sleep 1
    done
    echo "The nodes are not idle after a minute; see the logs in $dir." >&2
    exit 1
    ;;
  stop)
    scancel --user="$(id -un)" || true
    for _ in $(seq 60); do  # until all have saved: daemons that end leave jobs behind
      if [ -z "$(squeue --noheader 2> /dev/null)" ]; then break; fi
      sleep 1
    done
    for pid in "$dir"/n1.pid "$dir"/n2.pid "$dir"/slurmctld.pid; do
      if [ -f "$pid" ]; then kill "$(cat "$pid")" || true; fi
    done
    ;;
  *)
    echo "Usage: $0 start|stop DIR" >&2
    exit 2
    ;;
esac
