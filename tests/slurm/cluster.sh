#!/usr/bin/env bash
# A throw-away, real SLURM cluster on one machine, as root: no systemd, no docker, no accounting.
#   cluster.sh up    DIR [NODES=8] [GPUS=8]   start it; it belongs to the calling process
#   cluster.sh down  DIR                      end it; what SLURM logged stays in DIR/log
#   cluster.sh crash DIR NODE                 cut a node's power: SIGKILL to all of its processes
#   cluster.sh boot  DIR NODE                 bring it back
# DIR/slurm.conf is the SLURM_CONF of whoever talks to it. Each node has its own network, process and mount namespace, host
# name and address; files are shared, so that all of the disk is the shared file system, and DIR/small a tiny one of it.
set -euo pipefail

PREFIX=kosmos NET=10.213.7 BRIDGE=ksbr0

die() {
  echo "cluster.sh: $*" >&2
  exit 1
}

stop() { # stop PIDFILE SIGNAL: end a process that was started here, and wait till it is gone
  local pid
  [[ -s $1 ]] || return 0
  pid=$(<"$1")
  rm -f "$1"
  kill "-$2" "$pid" 2>/dev/null || return 0
  for _ in {1..100}; do # gone, or a zombie that pid 1 has yet to reap
    [[ $(ps -o stat= -p "$pid" 2>/dev/null) =~ ^[^Z] ]] || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

boot() { # boot DIR NODE
  local dir=$1 name=$2
  mkdir -p "$dir/spool/$name"
  # The node's first process is a bash that only waits, and so reaps: killing it kills the node.
  # shellcheck disable=SC2016
  ip netns exec "ks-$name" unshare --pid --fork --kill-child --mount-proc --uts --mount --propagation private \
    bash -c 'hostname "$1"
             mount --bind "$2/hosts" /etc/hosts
             mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
             slurmd -D -N "$1" -f "$2/slurm.conf" & wait' \
    _ "$name" "$dir" >>"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/run/$name.pid"
}

write_conf() { # write_conf DIR NODES GPUS
  local dir=$1 nodes=$2 gpus=$3 i controller
  controller=$(hostname -s)
  {
    echo "127.0.0.1 localhost"
    echo "$NET.1 $controller"
    for ((i = 1; i <= nodes; i++)); do echo "$NET.$((10 + i)) $PREFIX$i"; done
  } >"$dir/hosts"
  # No DNS inside the nodes: every reverse look-up of a peer would cost seconds.
  {
    grep -v '^hosts:' /etc/nsswitch.conf || true
    echo 'hosts: files'
  } >"$dir/nsswitch.conf"
  # Clones of /dev/null stand for /dev/nvidiaN.
  for ((i = 0; i < gpus; i++)); do mknod "$dir/dev/nvidia$i" c 1 3; done
  echo "NodeName=${PREFIX}[1-$nodes] Name=gpu Type=fake File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=kosmostest
SlurmctldHost=$controller($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire also sets how long a requeued job is held back: 120 s by default
AuthInfo=socket=$dir/munge/sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/%n
SlurmctldPort=16817
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,default_queue_depth=50,batch_sched_delay=0
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
BatchStartTimeout=20
MessageTimeout=20
KillWait=10
OverTimeLimit=0
MinJobAge=3600
MaxArraySize=100
TreeWidth=64
CONF
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=$PREFIX$i NodeAddr=$NET.$((10 + i)) Port=17000 CPUs=64 RealMemory=1000000 Gres=gpu:fake:$gpus State=UNKNOWN"
  done >>"$dir/slurm.conf"
  cat >>"$dir/slurm.conf" <<CONF
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

up() { # up DIR [NODES] [GPUS]
  local dir=$1 nodes=${2:-8} gpus=${3:-8} i other program
  for program in slurmctld slurmd munged; do
    command -v "$program" >/dev/null || die "no $program: apt-get install slurm-wlm munge"
  done
  [[ $(id -u) = 0 ]] || die "needs root, for namespaces"
  if ip link show "$BRIDGE" >/dev/null 2>&1; then
    other=$(ip link show "$BRIDGE" | sed -n 's/^ *alias //p')
    ! kill -0 "$(cat "$other/run/owner" 2>/dev/null)" 2>/dev/null || die "a cluster is running in $other"
    down "$other" # whoever started it was killed
  fi
  mkdir -p "$dir"/{run,log,state,spool,munge,dev,small}
  dir=$(realpath "$dir")
  chmod 755 "$dir" "$dir"/{run,log}
  echo "$PPID" >"$dir/run/owner"
  echo "$nodes" >"$dir/run/nodes"
  trap '[[ $? = 0 ]] || down "'"$dir"'"' EXIT
  ip link add "$BRIDGE" type bridge
  ip link set "$BRIDGE" alias "$dir" up
  ip addr add "$NET.1/24" dev "$BRIDGE"
  mount -t tmpfs -o size=64m kosmos-small "$dir/small"
  write_conf "$dir" "$nodes" "$gpus"

  head -c 128 /dev/urandom >"$dir/munge/key"
  chmod 600 "$dir/munge/key"
  chmod 711 "$dir/munge"
  munged --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/run/munged.pid" \
    --log-file="$dir/log/munged" --seed-file="$dir/munge/seed" --force 2>"$dir/log/munged.out"
  for ((i = 1; i <= nodes; i++)); do
    ip netns add "ks-$PREFIX$i"
    ip link add "ksv$i" type veth peer name eth0 netns "ks-$PREFIX$i"
    ip link set "ksv$i" master "$BRIDGE" up
    ip -n "ks-$PREFIX$i" addr add "$NET.$((10 + i))/24" dev eth0
    ip -n "ks-$PREFIX$i" link set lo up
    ip -n "ks-$PREFIX$i" link set eth0 up
  done
  slurmctld -D -i -f "$dir/slurm.conf" >"$dir/log/slurmctld.out" 2>&1 </dev/null &
  echo $! >"$dir/run/controller.pid"
  for ((i = 1; i <= nodes; i++)); do boot "$dir" "$PREFIX$i"; done
  export SLURM_CONF=$dir/slurm.conf
  for _ in {1..300}; do
    [[ $(sinfo -h -N -p train -t idle -o %N 2>/dev/null | wc -l) != "$nodes" ]] || return 0
    sleep 0.2
  done
  sinfo -N -l >&2 || true
  tail -n 20 "$dir"/log/* >&2 || true
  die "the nodes did not become idle"
}

down() { # down DIR
  local dir=$1 nodes i
  nodes=$(cat "$dir/run/nodes" 2>/dev/null || echo 0)
  for ((i = 1; i <= nodes; i++)); do stop "$dir/run/$PREFIX$i.pid" KILL; done
  stop "$dir/run/controller.pid" TERM
  stop "$dir/run/munged.pid" TERM
  for ((i = 1; i <= nodes; i++)); do ip netns del "ks-$PREFIX$i" 2>/dev/null || true; done
  ip link del "$BRIDGE" 2>/dev/null || true
  ! mountpoint -q "$dir/small" || umount "$dir/small"
  rm -rf "${dir:?}"/{run,state,spool,munge,dev,small}
}

[[ $# -ge 2 ]] || die "usage: cluster.sh up|down|crash|boot DIR ..."
case $1 in
  up) up "${@:2}" ;;
  down) down "$(realpath "$2")" ;;
  crash) stop "$2/run/$3.pid" KILL ;;
  boot) boot "$(realpath "$2")" "$3" ;;
  *) die "unknown command $1" ;;
esac
