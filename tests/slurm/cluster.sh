#!/usr/bin/env bash
# A SLURM cluster of one machine, this one, in a folder of its own:  cluster.sh start FOLDER | stop FOLDER
# Needs root and the packages slurm-wlm and munge; nothing outside the folder is touched. `start` prints the SLURM_CONF
# to use. The node has 4 CPUs whatever the machine has, so that several jobs of a test run at once.
set -euo pipefail
action=$1 folder=$(readlink -m "$2")

stop() {
  for name in slurmd slurmctld munged; do
    if [ -s "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
  done
}

if [ "$action" = stop ]; then
  stop
  exit
fi

mkdir -p "$folder"/{state,spool}
chmod 755 "$folder"
head -c 128 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" --force

port=$((20000 + RANDOM % 20000))
host=$(hostname -s)
cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
JobRequeue=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$folder/slurm.conf"
slurmctld
slurmd
for _ in $(seq 60); do
  if sinfo -h -o %T 2>/dev/null | grep -qx idle; then
    echo "$SLURM_CONF"
    exit
  fi
  sleep 0.5
done
echo "SLURM did not come up:" >&2
tail -n 20 "$folder"/*.log >&2
stop
exit 1
