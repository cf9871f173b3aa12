#!/usr/bin/env bash
# sandbox.sh - a throw-away but real Slurm cluster on one machine.
#
# Every "machine" of the cluster is a set of Linux namespaces (net, uts, mount,
# pid, ipc) with its own address, hostname, /proc, /sys, /dev/shm, munged and
# slurm daemon:
#
#     ctl   10.231.0.1     slurmctld, also the login node
#     n1    10.231.0.11    slurmd, 8 CPUs and 8 stand-in GPUs (configurable)
#     n2    10.231.0.12    slurmd ...
#
# They are joined by a bridge that lives inside ctl, so nothing is added to the
# host's own network and several sandboxes can be up at once (give each its own
# SLURM_SANDBOX_DIR).  The filesystem is shared, as on a cluster; /dev/shm and
# $SLURM_SANDBOX_DIR/local are private to each machine, and so is every
# directory listed in SLURM_SANDBOX_PRIVATE.
#
# Needs root (or CAP_SYS_ADMIN + CAP_NET_ADMIN), no systemd, no network.
#
#   sandbox.sh install              apt-get install what is missing; fails, with the reason last, where none can be
#   sandbox.sh up                   start (a no-op when already up)
#   sandbox.sh down                 stop, remove the state directory
#   sandbox.sh status               0 when every daemon is alive
#   sandbox.sh exec CMD...          run CMD on the login node
#   sandbox.sh on NODE CMD...       run CMD on a machine
#   eval "$(sandbox.sh env)"        put sbatch, srun, ... on this PATH
#   sandbox.sh power-off NODE       the machine dies at once
#   sandbox.sh power-on NODE        and comes back
#   sandbox.sh kill-slurmd NODE     slurmd dies, its jobs' processes live
#   sandbox.sh start-slurmd NODE
#   sandbox.sh unplug|plug NODE     the machine loses / regains its link
#   sandbox.sh logs                 the daemons' logs
#   sandbox.sh selftest             a 2-node srun
#
# Settings (environment, read by `up`):
#   SLURM_SANDBOX_DIR      state directory   (/tmp/slurm_sandbox.<uid>)
#   SLURM_SANDBOX_NODES    compute nodes     (3)
#   SLURM_SANDBOX_CPUS     CPUs a node       (8; need not exist)
#   SLURM_SANDBOX_GPUS     gres/gpu a node   (8; stand-ins, 0 for none)
#   SLURM_SANDBOX_MEM      MiB a node        (4096; not enforced)
#   SLURM_SANDBOX_PRIVATE  directories that are node-local ("" ; e.g. "/scratch")
#   SLURM_SANDBOX_TIMEOUT  SlurmdTimeout, s  (20: a dead node is down in 10-40 s)
#   SLURM_SANDBOX_CONF     extra lines for slurm.conf
#
# With gcc and libslurm-dev (install fetches both) srun and sbatch also
# take pyxis' --container-* options.  No container is entered: each option is
# checked, and shown to the task as SANDBOX_CONTAINER_IMAGE, ..._MOUNTS and so on.
# shellcheck disable=SC2016  # what stands in single quotes is for the shell of another machine
set -euo pipefail

self=$(readlink -f "${BASH_SOURCE[0]}")
DIR=${SLURM_SANDBOX_DIR:-/tmp/slurm_sandbox.$(id -u)}
NET=10.231.0
CLIENTS="sbatch srun salloc squeue scancel scontrol sinfo sattach sbcast strigger sprio"
PATH=$PATH:/usr/sbin:/sbin

say() { printf 'slurm_sandbox: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# ------------------------------------------------------------------ processes
# A process is known by its pid and its start time, so that a pid that the
# kernel has handed to someone else is never signalled.

start_time() {                # PID -> field 22 of /proc/PID/stat, nothing if dead
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    read -r -a fields <<< "${stat##*) }"    # the command name may hold blanks
    [ "${fields[0]}" != Z ] || return 1
    echo "${fields[19]}"
}

init_pid() {                  # MACHINE -> pid of its init, fails when it is not alive
    local pid born now
    [ -r "$DIR/pids/$1" ] || return 1
    read -r pid born < "$DIR/pids/$1" || return 1
    now=$(start_time "$pid") || return 1
    [ "$now" = "$born" ] || return 1
    echo "$pid"
}

machines() { local i; echo ctl; for ((i = 1; i <= NODES; i++)); do echo "n$i"; done; }
address() { case $1 in ctl) echo $NET.1 ;; *) echo $NET.$((10 + ${1#n})) ;; esac; }

load() {                      # settings of the sandbox that is up
    [ -r "$DIR/settings" ] || die "not up ($DIR)"
    # shellcheck source=/dev/null
    . "$DIR/settings"
}

wait_for() {                  # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}

# ------------------------------------------------------- inside a machine: init
# Runs as pid 1 of the machine's pid namespace.  When it is killed the kernel
# kills every process of the machine with it.

machine_init() {
    local name=$1 pid rest d
    # /proc is still the host's, so this is the pid that the host sees; a
    # redirection is opened by this shell itself, not by a child.
    read -r pid rest < /proc/self/stat
    echo "$pid $(start_time "$pid")" > "$DIR/pids/.$name"
    mv "$DIR/pids/.$name" "$DIR/pids/$name"

    hostname "$name"
    mount -t proc proc /proc
    # A new sysfs shows this machine's links; the control groups stay visible.
    mkdir -p "$DIR/cg/$name"
    if mountpoint -q /sys/fs/cgroup && mount --rbind /sys/fs/cgroup "$DIR/cg/$name"; then
        mount -t sysfs sysfs /sys && mount --rbind "$DIR/cg/$name" /sys/fs/cgroup || :
    fi
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mount -t tmpfs -o mode=755 tmpfs "$DIR/local"
    # Names come from one file; a lookup never waits for a DNS server.
    mount --bind "$DIR/etc/hosts" /etc/hosts
    mount --bind "$DIR/etc/nsswitch.conf" /etc/nsswitch.conf
    for d in $PRIVATE; do
        mkdir -p "$d" && mount -t tmpfs -o mode=1777 tmpfs "$d"
    done
    ip link set lo up

    wait_for 90 test -e "$DIR/pids/$name.wired" || die "$name: no link"
    start_munged
    case $name in ctl) start_slurmctld ;; *) start_slurmd ;; esac
    trap : HUP INT TERM
    # Reap for ever: the orphans of this machine are ours.
    while :; do sleep infinity & wait -n || :; done
}

start_munged() {
    # One munged a machine, one key for all: a credential is decoded at most
    # once by each, as on a cluster, so replay detection stays on.
    mkdir -p "$DIR/local/munge"
    munged --foreground --key-file="$DIR/etc/munge.key" \
        --socket="$DIR/local/munge/sock" --pid-file="$DIR/local/munge/pid" \
        --seed-file="$DIR/local/munge/seed" --log-file="$DIR/local/munge/log" &
    wait_for 60 test -S "$DIR/local/munge/sock" || die "munged did not start"
}
start_slurmctld() { slurmctld -D -f "$SLURM_CONF" & }
start_slurmd() { mkdir -p "$DIR/local/spool"; slurmd -D -f "$SLURM_CONF" & }

# ------------------------------------------------------------------- from outside

enter() {                     # MACHINE CMD...: in its namespaces, same directory
    local pid name=$1; shift
    pid=$(init_pid "$name") || die "$name is not running"
    exec nsenter -t "$pid" -m -u -i -n -p -- setpriv --pdeathsig TERM -- \
        env "SLURM_CONF=$DIR/etc/slurm.conf" \
        sh -c 'cd "$0" 2> /dev/null || cd /; exec "$@"' "$PWD" "$@"
}

start_machine() {
    local name=$1 pid
    rm -f "$DIR/pids/$name" "$DIR/pids/$name.wired"
    SLURM_SANDBOX_DIR=$DIR PRIVATE=$PRIVATE SLURM_CONF=$DIR/etc/slurm.conf \
        setsid unshare --net --uts --mount --ipc --pid --fork --kill-child \
        bash "$self" __init "$name" < /dev/null >> "$DIR/log/$name.out" 2>&1 9>&- &
    wait_for 60 test -s "$DIR/pids/$name" || die "$name did not start: $(tail -3 "$DIR/log/$name.out")"
    pid=$(init_pid "$name") || die "$name died: $(tail -3 "$DIR/log/$name.out")"
    if [ "$name" = ctl ]; then
        nsenter -t "$pid" -n sh -ec "
            ip link add br0 type bridge forward_delay 0
            ip addr add $(address ctl)/24 dev br0
            ip link set br0 up"
    else
        # Both ends are made where they belong; the host never sees them.
        nsenter -t "$(init_pid ctl)" -n sh -ec "
            ip link del v-$name 2>/dev/null || :
            ip link add v-$name type veth peer name eth0 netns $pid
            ip link set v-$name master br0 up"
        nsenter -t "$pid" -n sh -ec "
            ip addr add $(address "$name")/24 dev eth0
            ip link set eth0 up"
    fi
    touch "$DIR/pids/$name.wired"
}

stop_machine() {              # the power button
    local pid
    pid=$(init_pid "$1") || return 0
    kill -KILL "$pid"
    wait_for 60 eval "! init_pid $1 > /dev/null" || die "$1 (pid $pid) does not die"
}

write_config() {
    local i hosts="127.0.0.1 localhost" gres=""
    mkdir -p "$DIR"/{etc,log,pids,local,cg,state,bin,dev}
    chmod 755 "$DIR" "$DIR/etc" "$DIR/local"
    chmod 700 "$DIR/state"
    [ -s "$DIR/etc/munge.key" ] || (umask 077; head -c 128 /dev/urandom > "$DIR/etc/munge.key")
    for i in $(machines); do hosts+=$'\n'"$(address "$i") $i"; done
    printf '%s\n' "$hosts" > "$DIR/etc/hosts"
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf > "$DIR/etc/nsswitch.conf"
    : > "$DIR/etc/gres.conf"
    if [ "$GPUS" -gt 0 ]; then
        # slurmd wants device files; these are all /dev/null.
        for ((i = 0; i < GPUS; i++)); do
            [ -e "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3
        done
        gres="Gres=gpu:$GPUS"
        echo "NodeName=n[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" > "$DIR/etc/gres.conf"
    fi
    echo "CgroupPlugin=cgroup/v1" > "$DIR/etc/cgroup.conf"
    cat > "$DIR/etc/slurm.conf" <<EOF
ClusterName=sandbox
SlurmctldHost=ctl($(address ctl))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job must wait (120 s by default).
AuthInfo=socket=$DIR/local/munge/sock,cred_expire=10
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/local/spool
SlurmctldPidFile=$DIR/local/slurmctld.pid
SlurmdPidFile=$DIR/local/slurmd.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
# Nothing here needs control groups or the CPUs that it promises.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
${gres:+GresTypes=gpu}
# Short tempers, so that a test need not wait for minutes; not so short that a busy machine looks like a dead one.
SlurmdTimeout=$TIMEOUT
SlurmctldTimeout=10
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=60
KillWait=5
CompleteWait=0
UnkillableStepTimeout=180
MinJobAge=86400
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000,batch_sched_delay=0
PriorityType=priority/basic
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
PropagateResourceLimitsExcept=MEMLOCK
PlugStackConfig=$DIR/etc/plugstack.conf
EOF
    : > "$DIR/etc/plugstack.conf"
    for i in $(machines); do
        [ "$i" = ctl ] && continue
        echo "NodeName=$i NodeAddr=$(address "$i") CPUs=$CPUS Boards=1 SocketsPerBoard=1" \
            "CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres State=UNKNOWN"
    done >> "$DIR/etc/slurm.conf"
    cat >> "$DIR/etc/slurm.conf" <<EOF
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low   Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=20
${SLURM_SANDBOX_CONF:-}
EOF
    local c
    for c in $CLIENTS; do
        cat > "$DIR/bin/$c" <<EOF
#!/bin/sh
# On a machine of the cluster (its munged is there): the real one, at once.
if [ -S "$DIR/local/munge/sock" ]; then
    real=\$(PATH=\$(printf %s "\$PATH" | tr : '\\n' | grep -vxF "$DIR/bin" | paste -sd:) command -v $c)
    exec "\$real" "\$@"
fi
SLURM_SANDBOX_DIR="$DIR" exec bash "$DIR/bin/slurm_sandbox" exec $c "\$@"
EOF
        chmod 755 "$DIR/bin/$c"
    done
    cp "$self" "$DIR/bin/slurm_sandbox"
    cat > "$DIR/settings" <<EOF
NODES=$NODES CPUS=$CPUS GPUS=$GPUS MEM=$MEM TIMEOUT=$TIMEOUT PRIVATE='$PRIVATE'
EOF
}

write_spank() {               # the stand-in for pyxis
    command -v gcc > /dev/null && [ -e /usr/include/slurm/spank.h ] || return 0
    cat > "$DIR/etc/pyxis_standin.c" <<'EOF'
#include <slurm/spank.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
SPANK_PLUGIN(pyxis_standin, 1)
#define N 16
static char *seen[N];
static int take(int val, const char *arg, int remote) {
    (void)remote;
    free(seen[val]);
    seen[val] = strdup(arg && *arg ? arg : "1");
    return 0;
}
#define OPT(i, name, arg) { name, arg, "[pyxis] stand-in", (arg) ? 1 : 0, i, take }
struct spank_option spank_options[] = {
    OPT(0, "container-image", "IMAGE"), OPT(1, "container-mounts", "SRC:DST[:FLAGS],..."),
    OPT(2, "container-workdir", "PATH"), OPT(3, "container-name", "NAME"),
    OPT(4, "container-save", "PATH"), OPT(5, "container-env", "NAME,..."),
    OPT(6, "container-mount-home", NULL), OPT(7, "no-container-mount-home", NULL),
    OPT(8, "container-remap-root", NULL), OPT(9, "no-container-remap-root", NULL),
    OPT(10, "container-writable", NULL), OPT(11, "container-readonly", NULL),
    OPT(12, "container-entrypoint", NULL), OPT(13, "no-container-entrypoint", NULL),
    SPANK_OPTIONS_TABLE_END
};
/* srun and slurmstepd read the table by themselves, sbatch and salloc do not. */
int slurm_spank_init(spank_t sp, int ac, char **av) {
    (void)ac; (void)av;
    if (spank_context() == S_CTX_ALLOCATOR)
        for (int i = 0; spank_options[i].name; i++)
            spank_option_register(sp, &spank_options[i]);
    return 0;
}
/* What pyxis refuses on the login node: half a mount, a path that is not absolute. */
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av) {
    char *m, *p, *save = NULL;
    (void)sp; (void)ac; (void)av;
    if (seen[2] && seen[2][0] != '/')
        return slurm_error("pyxis: --container-workdir: %s is not absolute", seen[2]), -1;
    if (!seen[1])
        return 0;
    m = strdup(seen[1]);
    for (p = strtok_r(m, ",", &save); p; p = strtok_r(NULL, ",", &save)) {
        char *dst = strchr(p, ':');
        if (dst ? dst[1] != '/' : p[0] != '/')
            return slurm_error("pyxis: --container-mounts: invalid format: %s", p), -1;
    }
    free(m);
    return 0;
}
int slurm_spank_task_init(spank_t sp, int ac, char **av) {
    (void)ac; (void)av;
    for (int i = 0; spank_options[i].name; i++) {
        char name[64];
        if (!seen[i])
            continue;
        snprintf(name, sizeof name, "SANDBOX_%s", spank_options[i].name);
        for (char *c = name; *c; c++)
            *c = *c == '-' ? '_' : toupper((unsigned char)*c);
        spank_setenv(sp, name, seen[i], 1);
    }
    return 0;
}
EOF
    if gcc -shared -fPIC -o "$DIR/etc/pyxis_standin.so" "$DIR/etc/pyxis_standin.c"; then
        echo "required $DIR/etc/pyxis_standin.so" > "$DIR/etc/plugstack.conf"
    else
        say "the stand-in for pyxis does not compile; going without"
    fi
}

missing() {
    local c
    for c in slurmctld slurmd sbatch srun munged unshare nsenter setpriv ip gcc; do
        command -v $c > /dev/null || echo $c
    done
}

check_rights() {
    [ "$(id -u)" = 0 ] || die "needs root"
    unshare --net --uts --mount --ipc --pid --fork true 2>/dev/null ||
        die "this machine does not allow namespaces"
}
check_links() {
    unshare --net sh -c 'ip link add br0 type bridge && ip link add veth0 type veth peer name veth1' 2>/dev/null ||
        die "this kernel has no bridges or veth links"
}

all_idle() {
    local n
    n=$( (enter ctl sinfo -h -N -p batch -t idle -o %n) 2>/dev/null | sort -u | wc -l)
    [ "$n" -eq "$NODES" ]
}

settled() { grep -qs 'fatal:' "$DIR"/log/*.out || all_idle; }

all_alive() {
    local m
    for m in $(machines); do init_pid "$m" > /dev/null || return 1; done
    (enter ctl scontrol ping) 2>/dev/null | grep -q 'is UP'
}

locked() {                    # one up or down at a time
    exec 9> "$DIR.lock"
    flock -w 120 9 || die "another up or down is running"
}

case ${1:-} in
install)
    check_rights
    if [ -z "$(missing)" ] && [ -e /usr/include/slurm/spank.h ]; then check_links; exit 0; fi
    command -v apt-get > /dev/null || die "no apt-get to install with: $(missing | xargs)"
    # A policy that lets no service start, unless there is one already.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get -o DPkg::Lock::Timeout=300 update
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
        slurmctld slurmd slurm-client munge iproute2 util-linux gcc libc6-dev libslurm-dev
    check_links
    ;;
up)
    [ -z "$(missing)" ] || die "missing: $(missing | xargs); run: $self install"
    check_rights
    check_links
    locked
    if [ -r "$DIR/settings" ]; then
        # shellcheck source=/dev/null
        . "$DIR/settings"
        if all_alive; then say "already up ($DIR)"; exit 0; fi
        say "found half a sandbox; starting afresh"
        bash "$self" __down
    fi
    NODES=${SLURM_SANDBOX_NODES:-3} CPUS=${SLURM_SANDBOX_CPUS:-8} GPUS=${SLURM_SANDBOX_GPUS:-8}
    MEM=${SLURM_SANDBOX_MEM:-4096} TIMEOUT=${SLURM_SANDBOX_TIMEOUT:-20} PRIVATE=${SLURM_SANDBOX_PRIVATE:-}
    write_config
    write_spank
    for m in $(machines); do start_machine "$m"; done
    wait_for 120 settled || :
    all_idle || { bash "$self" logs >&2; bash "$self" __down; die "the nodes did not come up"; }
    say "up: $NODES nodes of $CPUS CPUs and $GPUS stand-in GPUs ($DIR)"
    ;;
down)
    locked
    bash "$self" __down 9>&-
    rm -f "$DIR.lock"
    ;;
__down)
    [ -r "$DIR/settings" ] || exit 0
    load
    for m in $(machines | tac); do stop_machine "$m"; done
    rm -rf --one-file-system "${DIR:?}"
    ;;
__init)
    machine_init "$2"
    ;;
status)
    load
    all_alive || { say "not whole ($DIR)"; exit 1; }
    (enter ctl sinfo -N -o '%N %T %c %m %G %P')
    ;;
env)
    load
    echo "export SLURM_SANDBOX_DIR='$DIR' SLURM_CONF='$DIR/etc/slurm.conf' PATH='$DIR/bin':\"\$PATH\""
    ;;
exec)
    load; shift
    enter ctl "$@"
    ;;
on)
    load; shift
    enter "$@"
    ;;
power-off)
    load; stop_machine "$2"
    ;;
power-on)
    load; init_pid "$2" > /dev/null || start_machine "$2"
    ;;
kill-slurmd)
    load
    # The pid file holds the pid that the machine itself sees.
    (enter "$2" sh -c 'kill -KILL "$(cat "$0")"' "$DIR/local/slurmd.pid")
    ;;
start-slurmd)
    load
    (enter "$2" setsid -f slurmd -D -f "$DIR/etc/slurm.conf" < /dev/null >> "$DIR/log/$2.out" 2>&1)
    ;;
unplug | plug)
    load
    state=up; [ "$1" = plug ] || state=down
    nsenter -t "$(init_pid ctl)" -n ip link set "v-$2" $state
    # slurmd registers at once instead of within half a minute.
    [ $state = down ] || (enter "$2" sh -c 'kill -HUP "$(cat "$0")"' "$DIR/local/slurmd.pid")
    ;;
logs)
    tail -n "${2:-40}" "$DIR"/log/*
    ;;
selftest)
    load
    out=$( (enter ctl srun -N2 -n2 -t1 bash -c 'echo "$(hostname) $SLURM_PROCID $SLURM_JOB_NODELIST"') | sort)
    echo "$out"
    [ "$(echo "$out" | awk '{print $1}' | sort -u | wc -l)" = 2 ] || die "selftest failed"
    ;;
*)
    sed -n '2,/^set -e/p' "$self" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
