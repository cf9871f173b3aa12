#!/usr/bin/env bash
# sapo_moe.sh: one training run on a Slurm cluster, that survives nodes, servers, time limits and preemption.
#
#   sbatch --job-name=NAME --nodes=4 slurm/sapo_moe.sh CONFIG.yaml [a.b=c ...]
#   DRY_RUN=1 slurm/sapo_moe.sh CONFIG.yaml [a.b=c ...]      what would be started, without Slurm
#
# The first LEARNER_NODES nodes learn, each of the others serves rollouts. Submit it from the checkout: paths in CONFIG
# are relative to there, and the python of .venv, if there is one, is taken. slurm/README.md says how a run survives
# what, and what to do when it does not.
#
# Every knob is an environment variable of sbatch:
#
#   LEARNER_NODES=1          nodes that learn; `all`: servers share the learners' nodes and GPUs
#   GPUS_PER_NODE=           GPUs on a node; default: what Slurm gave, else 8; 0: learn on CPUs
#   NPROC_PER_NODE=          ranks on a learner node; default: one a GPU
#   SERVER_TP=               GPUs of one rollout server; default: all of its node
#   SERVER_COMMAND=          another command for a server, with {model} {port} {host} {api_key_file} to be filled in
#   MIN_SERVERS=1            fewer than these for good: the learner saves, and the job ends FAILED
#   MAX_SERVER_RESTARTS=5    of each server in a row
#   RESTARTS_FORGIVEN_AFTER=3600 seconds of life that give a server all its restarts again
#   ROLLOUT_PORT=30000       first port of the servers; every attempt takes the next ones
#   HEALTH_TIMEOUT=1800      seconds until all servers must answer; a large MoE loads slowly
#   STOP_GRACE=540           seconds the learner has to finish its step and save; less than --signal's 600
#   MAX_CRASHES=2            attempts in a row without a new checkpoint that are tried again
#   MAX_ATTEMPTS=100         of one job, whatever ended them
#   PYTHON=                  of megasapo; default: .venv/bin/python below the directory of sbatch, else python3
#   SERVER_PYTHON=           of SGLang's environment; default: what the image sets, else PYTHON
#   SRUN_FLAGS=              further flags of every srun, in one string
#   CONTAINER_IMAGE=         run everything in this image (pyxis): file or registry URL
#   CONTAINER_MOUNTS=        SRC:DST,... beside the directory of sbatch, for runs, models and data outside of it
#   DRY_RUN=                 1: print the plan and end; makes no file
#   NODES=2                  nodes of the plan, where DRY_RUN is used outside Slurm
#
# Whatever else is in the environment reaches learners and servers, too: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME,
# NCCL_IB_HCA and NCCL_DEBUG are the site's to set; nothing is guessed. No secret is ever on a command line: the
# servers' API key is made in RUN/api_key, or read from rollout.api_key_file.
#
#SBATCH --job-name=sapo-moe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.out
# Attempts of one job append to one log, and no two jobs of a name run at once: submit it several times for a chain.
#SBATCH --open-mode=append
#SBATCH --dependency=singleton
# USR1 to this script alone, ten minutes before the end or at a preemption.
#SBATCH --signal=B:USR1@600
# A lost node starts the job again, from the last checkpoint. Not --no-kill: when the first node is lost, that leaves a
# job without its script, which runs until its limit.
#SBATCH --requeue
set -uo pipefail

usage() { sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "$0"; }
[ $# -gt 0 ] && [[ $1 != -* ]] || { usage; exit 2; }

DRY_RUN=${DRY_RUN:-}
LEARNER_NODES=${LEARNER_NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MIN_SERVERS=${MIN_SERVERS:-1}
MAX_SERVER_RESTARTS=${MAX_SERVER_RESTARTS:-5}
RESTARTS_FORGIVEN_AFTER=${RESTARTS_FORGIVEN_AFTER:-3600}
ROLLOUT_PORT=${ROLLOUT_PORT:-30000}
HEALTH_TIMEOUT=${HEALTH_TIMEOUT:-1800}
STOP_GRACE=${STOP_GRACE:-540}
MAX_CRASHES=${MAX_CRASHES:-2}
MAX_ATTEMPTS=${MAX_ATTEMPTS:-100}
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
home=${SLURM_SUBMIT_DIR:-$PWD}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -n "$CONTAINER_IMAGE" ] || [ ! -x "$home/.venv/bin/python" ] || PYTHON=$home/.venv/bin/python
fi
job=${SLURM_JOB_ID:-0}
attempt=${SLURM_RESTART_COUNT:-0}
diary=                                             # file beside stdout; known once the run is
say() {
    local line
    line="[$(date '+%F %T')] $(uname -n) job $job attempt $attempt: $*"
    echo "$line"
    [ -z "$diary" ] || echo "$line" >> "$diary"
}

for knob in GPUS_PER_NODE MIN_SERVERS MAX_SERVER_RESTARTS RESTARTS_FORGIVEN_AFTER ROLLOUT_PORT HEALTH_TIMEOUT \
    STOP_GRACE MAX_CRASHES MAX_ATTEMPTS ${NPROC_PER_NODE:+NPROC_PER_NODE} ${SERVER_TP:+SERVER_TP} ${NODES:+NODES}; do
    [[ ${!knob} =~ ^(0|[1-9][0-9]*)$ ]] || { say "$knob=${!knob}: give a whole number"; exit 2; }
done
[[ $LEARNER_NODES =~ ^(all|[1-9][0-9]*)$ ]] || { say "LEARNER_NODES=$LEARNER_NODES: give a number from 1, or all"; exit 2; }

for python in "$PYTHON" "${SERVER_PYTHON:-$PYTHON}"; do
    [ -n "$CONTAINER_IMAGE" ] || command -v "$python" > /dev/null ||
        { say "$python (PYTHON or SERVER_PYTHON) is not on $(uname -n): install it on a file system that all nodes share"; exit 2; }
done

# ---- who does what
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    [ -n "$DRY_RUN" ] || { echo "sapo_moe.sh: no Slurm job here: use sbatch, or DRY_RUN=1" >&2; exit 2; }
    NODES=${NODES:-2}
    mapfile -t hosts < <(seq -f 'node%g' 1 "$NODES")
fi
colocated=()
if [ "$LEARNER_NODES" = all ]; then
    LEARNER_NODES=${#hosts[@]}
    colocated=(--colocated)
    rollouts=("${hosts[@]}")
elif [ "${#hosts[@]}" -le "$LEARNER_NODES" ]; then
    say "LEARNER_NODES=$LEARNER_NODES of ${#hosts[@]} nodes leaves none for rollouts: use fewer, more --nodes, or all"
    exit 2
else
    rollouts=("${hosts[@]:LEARNER_NODES}")
fi
learners=("${hosts[@]:0:LEARNER_NODES}")
# Processes of an attempt whose node lost touch may live on: the next attempt must share no port with them.
first_port=$((ROLLOUT_PORT + attempt % 100 * 16))
master_port=$((20000 + (job * 7 + attempt) % 8000))

# ---- how steps are started
# Since 22.05 srun does not inherit --cpus-per-task from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
unset MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK
# --overlap: several servers on a node, or servers beside learners, share what Slurm would else give to one step.
step=(srun --ntasks-per-node=1 --overlap --cpu-bind=none --open-mode=append)
[ "$GPUS_PER_NODE" = 0 ] || step+=(--gpus-per-node="$GPUS_PER_NODE")
read -r -a further <<< "${SRUN_FLAGS:-}"
step+=("${further[@]}")
mounts=("$home:$home")
[ -z "${CONTAINER_MOUNTS:-}" ] || mounts+=("$CONTAINER_MOUNTS")
container() {                                      # flags of pyxis, if asked for
    [ -n "$CONTAINER_IMAGE" ] || return 0
    local IFS=,
    echo "--container-image=$CONTAINER_IMAGE"
    echo "--no-container-mount-home"
    echo "--container-workdir=$home"
    echo "--container-mounts=${mounts[*]}"
}

# ---- what has to be started: checked, and decided, by `megasapo cluster`
plan=("$PYTHON" -m megasapo.cli cluster "$@" --learner-nodes "$LEARNER_NODES" --gpus "$GPUS_PER_NODE" "${colocated[@]}"
      --servers "$(printf "%s:$first_port\n" "${rollouts[@]}" | paste -sd,)")
[ -z "${SERVER_PYTHON:-}" ] || plan+=(--server-python "$SERVER_PYTHON")
[ -z "${NPROC_PER_NODE:-}" ] || plan+=(--nproc "$NPROC_PER_NODE")
[ -z "${SERVER_TP:-}" ] || plan+=(--server-tp "$SERVER_TP")
[ -z "${SERVER_COMMAND:-}" ] || plan+=(--server-command "$SERVER_COMMAND")
if [ -n "$DRY_RUN" ]; then
    say "learners ${learners[*]}; rollouts ${rollouts[*]}; rendezvous ${learners[0]}:$master_port"
    exec "${plan[@]}" --dry-run
fi
if [ -n "$CONTAINER_IMAGE" ]; then
    mapfile -t flags < <(container)
    plan=("${step[@]}" "${flags[@]}" --nodes=1 --ntasks=1 --nodelist="${hosts[0]}" --job-name=plan "${plan[@]}")
fi
decided=$("${plan[@]}") || { say "FAILED: this cannot run; the reason is above"; exit 2; }
eval "$decided"                                    # RUN_DIR NPROC SERVER_HOSTS SERVER_PORTS SERVER_COMMANDS TRAIN
: "${NPROC:?}" "${SERVER_HOSTS[0]:?}" "${SERVER_PORTS[0]:?}" "${SERVER_COMMANDS[0]:?}" "${TRAIN[0]:?}"
if [ ! -d "$RUN_DIR" ]; then
    say "FAILED: the container made $RUN_DIR, and it is not on $(hostname): add the directory above it to CONTAINER_MOUNTS"
    exit 2
fi
if [ "${#SERVER_HOSTS[@]}" -lt "$MIN_SERVERS" ]; then
    say "FAILED: MIN_SERVERS=$MIN_SERVERS, and the plan has ${#SERVER_HOSTS[@]}: lower it, or give more rollout nodes"
    exit 2
fi
mapfile -t flags < <(container)
step+=("${flags[@]}")
logs=$RUN_DIR/logs/$job.$attempt
mkdir -p "$logs"
diary=$RUN_DIR/logs/cluster.log
if [ -e "$RUN_DIR/done" ]; then say "$RUN_DIR has finished: nothing to do; to train on, raise train.steps and remove $RUN_DIR/done"; exit 0; fi
read -r other 2>/dev/null < "$RUN_DIR/logs/owner" || other=$job
if [ "$other" != "$job" ] && [ "$(squeue -h -j "$other" -t R -o %t 2>/dev/null)" = R ]; then
    say "FAILED: job $other is training $RUN_DIR: cancel it, choose another run.name, or give both one --job-name"
    exit 2
fi
echo "$job" > "$RUN_DIR/logs/owner"
say "learners ${learners[*]}; rollouts ${rollouts[*]}; rendezvous ${learners[0]}:$master_port; logs in $logs"
checkpoint() { cat "$RUN_DIR/checkpoints/latest" 2>/dev/null || echo none; }
began=$(checkpoint)

# ---- small tools
nap() { sleep "$1" & wait $! 2>/dev/null; }        # unlike a plain sleep, a trap interrupts it
alive() { [ -n "$1" ] && kill -0 "$1" 2>/dev/null; }
# The end of a log, without what torchrun has to say about ranks that failed by then.
last_words() { sed '/torch\/distributed\/elastic/,$d' "$1" 2>/dev/null | tail -n 20 | sed 's/^/    | /'; }
healthy() {                                        # no curl: containers' hosts and compute nodes may lack it
    # shellcheck disable=SC2016
    timeout 25 bash -c 'exec 3<> "/dev/tcp/$1/$2" && printf "GET /health HTTP/1.0\r\nHost: $1\r\n\r\n" >&3 &&
        read -r line <&3 && [[ $line == HTTP/*" 200"* ]]' - "${SERVER_HOSTS[$1]}" "${SERVER_PORTS[$1]}" 2>/dev/null
}
node_lost() { [[ $(sinfo -h -n "$1" -o %t 2>/dev/null | head -n 1) =~ \*|down|fail ]]; }
# ---- signals: only a note to the learner, which looks between two steps
why=                                               # why this attempt has to end, once it has to
ask_to_stop() {
    [ -z "$why" ] || return 0
    why=$1
    say "$1: asking the learner to save"
    echo "attempt $job.$attempt" > "$logs/stop" && mv "$logs/stop" "$RUN_DIR/stop"
}
trap 'ask_to_stop "time limit or preemption"' USR1
trap 'ask_to_stop "told to end"' TERM INT
# srun hands signals to every process of its step, and what does not ask for USR1 would die of it.
shield='trap "" USR1 USR2; exec "$@"'

# ---- how an attempt ends
declare -a server_pid=() server_starts=() server_began=() given_up=()
learner_pid=
end() {                                            # EXIT_CODE MESSAGE...
    local code=$1 pid
    shift
    for pid in "${server_pid[@]}" "$learner_pid"; do alive "$pid" && kill -TERM "$pid"; done
    for _ in {1..20}; do [ -n "$(jobs -rp)" ] || break; nap 1; done
    say "$@"
    exit "$code"                                   # Slurm ends what is left
}
# Slurm may have started this job again without the node of this script, which then is a ghost and must touch nothing.
leave_if_superseded() {
    local shown=
    for _ in {1..30}; do
        shown=$(scontrol show job "$job" 2>/dev/null) && break
        nap 10
    done
    [[ $shown == *"Restarts=$attempt "* ]] && return
    # KILL: a srun that is told gently asks Slurm to end its step, and the next attempt's has the same number.
    for shown in $(jobs -rp); do kill -KILL "$shown" 2>/dev/null; done
    say "Slurm has taken the job away from this attempt"
    exit 1
}
again() {                                          # the same job, from its last checkpoint
    leave_if_superseded
    [ "$((attempt + 1))" -lt "$MAX_ATTEMPTS" ] || end 1 "FAILED: $1; MAX_ATTEMPTS=$MAX_ATTEMPTS are used up"
    say "$1: requeue; the next attempt continues from checkpoint $(checkpoint)"
    trap 'exit 0' TERM INT                         # Slurm's word that it has taken the job back
    for _ in {1..30}; do
        scontrol requeue "$job" && break
        nap 10
    done
    nap 600                                        # Slurm ends this script
    end 1 "FAILED: $1; Slurm did not requeue the job"
}
crashed() {                                        # the budget is for crashes in a row without a new checkpoint
    local was=none count=0 now
    leave_if_superseded
    read -r was count 2>/dev/null < "$RUN_DIR/logs/crashes.$job" || was=none count=0
    now=$(checkpoint)
    [ "$now" = "$was" ] || count=0
    count=$((count + 1))
    echo "$now $count" > "$RUN_DIR/logs/crashes.$job"
    [ "$count" -gt "$MAX_CRASHES" ] || again "$1 (try $count of $MAX_CRASHES since checkpoint $now)"
    end 1 "FAILED: $1; attempts in a row without a checkpoint after $now: $count; see $logs"
}

# ---- rollout servers: a step each, so that they fail one at a time
server_log() { echo "$logs/server-${SERVER_HOSTS[$1]}-${SERVER_PORTS[$1]}.log"; }
start_server() {
    server_starts[$1]=$((${server_starts[$1]:--1} + 1))
    "${step[@]}" --nodes=1 --ntasks=1 --nodelist="${SERVER_HOSTS[$1]}" --job-name="server-$1" \
        --output="$(server_log "$1")" bash -c "$shield" - bash -c "${SERVER_COMMANDS[$1]}" < /dev/null &
    server_pid[$1]=$!
    server_began[$1]=$SECONDS
}
for i in "${!SERVER_HOSTS[@]}"; do start_server "$i"; done
deadline=$((SECONDS + HEALTH_TIMEOUT))
for i in "${!SERVER_HOSTS[@]}"; do
    name=${SERVER_HOSTS[$i]}:${SERVER_PORTS[$i]}
    until healthy "$i"; do
        [ "$why" != "told to end" ] || end 1 "ended while servers were starting; checkpoint $(checkpoint)"
        [ -z "$why" ] || crashed "$why while servers were starting"
        alive "${server_pid[$i]}" || { last_words "$(server_log "$i")"; crashed "server $name died while starting"; }
        [ "$SECONDS" -lt "$deadline" ] || {
            last_words "$(server_log "$i")"
            crashed "server $name does not answer after HEALTH_TIMEOUT=$HEALTH_TIMEOUT s"
        }
        nap 1
    done
done
say "all ${#SERVER_HOSTS[@]} servers answer"

# ---- the learner: one step; any rank that fails ends it, and Slurm is the only one to start it again
# Its number must not be that of the attempt before: Slurm repeats to a node that was dead what it had to be told, and
# "end step 5.1" would then end the new one. So every other attempt takes a step that does nothing before it.
[ $((attempt % 2)) = 0 ] ||
    timeout 60 srun --overlap --cpu-bind=none --nodes=1 --ntasks=1 --nodelist="${learners[0]}" true < /dev/null
# shellcheck disable=SC2016
"${step[@]}" --kill-on-bad-exit=1 --nodes="$LEARNER_NODES" --ntasks="$LEARNER_NODES" \
    --nodelist="$(IFS=,; echo "${learners[*]}")" --job-name=learner --output="$logs/learner-%N.log" \
    bash -c 'trap "" USR1 USR2; exec "$1" -m torch.distributed.run --node-rank="$SLURM_NODEID" "${@:2}"' - \
    "$PYTHON" --nnodes="$LEARNER_NODES" --nproc-per-node="$NPROC" --max-restarts=0 \
    --master-addr="${learners[0]}" --master-port="$master_port" "${TRAIN[@]}" < /dev/null &
learner_pid=$!

# ---- watch both
look_at_servers() {
    local i left=${#SERVER_HOSTS[@]} code name
    for i in "${!SERVER_HOSTS[@]}"; do
        alive "${server_pid[$i]}" && continue
        name=${SERVER_HOSTS[$i]}:${SERVER_PORTS[$i]}
        [ -n "${given_up[$i]:-}" ] || [ $((SECONDS - server_began[i])) -lt "$RESTARTS_FORGIVEN_AFTER" ] || server_starts[i]=0
        if [ "${server_starts[$i]}" -ge "$MAX_SERVER_RESTARTS" ]; then
            left=$((left - 1))
            lost=$name
            given_up[i]=yes
            continue
        fi
        wait "${server_pid[$i]}"; code=$?
        nap "${server_starts[$i]}"                 # a node that is being lost needs its time
        [ -z "$why" ] || return
        leave_if_superseded
        say "server $name ended ($code): restart $((server_starts[i] + 1)) of $MAX_SERVER_RESTARTS"
        start_server "$i"
    done
    [ "$left" -ge "$MIN_SERVERS" ] && return
    if node_lost "${lost%:*}"; then kill -TERM "$learner_pid"; crashed "node ${lost%:*} is lost"; fi
    ask_to_stop "$left servers left, MIN_SERVERS=$MIN_SERVERS, $lost restarted $MAX_SERVER_RESTARTS times"
    # Without any the learner cannot finish its step.
    [ "$left" -gt 0 ] || STOP_GRACE=$((STOP_GRACE < 60 ? STOP_GRACE : 60))
}
asked_at=
lost=
while alive "$learner_pid"; do
    nap 1
    if [ -z "$why" ]; then look_at_servers; fi
    [ -n "$why" ] || continue
    : "${asked_at:=$SECONDS}"
    if [ $((SECONDS - asked_at)) -ge "$STOP_GRACE" ]; then
        say "the learner did not stop within STOP_GRACE=$STOP_GRACE s; checkpoint $(checkpoint) stays"
        kill -TERM "$learner_pid"
        break
    fi
done
code=0
[ -z "$asked_at" ] || [ $((SECONDS - asked_at)) -lt "$STOP_GRACE" ] || code=1
[ "$code" = 1 ] || { wait "$learner_pid"; code=$?; }

# ---- the outcome, by files: torchrun turns every bad exit into 1
if [ -e "$RUN_DIR/done" ]; then end 0 "finished: $RUN_DIR"; fi
case $why in
"time limit or preemption")
    # A job too short for one step would else be requeued for ever.
    [ "$(checkpoint)" != "$began" ] || crashed "$why before a new checkpoint"
    again "stopped for $why (learner ended with $code)"
    ;;
"told to end") leave_if_superseded; end "$code" "stopped as told, at checkpoint $(checkpoint); sbatch it again to continue" ;;
?*) end 1 "FAILED: $why; the learner ended with $code, checkpoint $(checkpoint); see $(server_log 0)" ;;
esac
if [ "$code" = 0 ]; then
    end 0 "the learner stopped by itself (somebody made $RUN_DIR/stop?); sbatch it again to continue"
fi
for host in "${learners[@]}"; do echo "    $host:"; last_words "$logs/learner-$host.log"; done
crashed "the learner ended with $code"
