#!/bin/sh
# Train on all GPUs (or cores) of one machine or, started on each of several, on those of all.
#
#   launch/torchrun.sh nano_pretrain --tokenizer nano --train.shard full
#   NODES=2 NODE=0 HOST=first-machine launch/torchrun.sh small_tokenizer --out /shared/small
#   NODES=2 NODE=1 HOST=first-machine launch/torchrun.sh small_tokenizer --out /shared/small
#
# HOST is machine 0 as the others reach it, at PORT; the run folder is one that all share. There are
# as many processes as GPUs, or PROCESSES on each machine. Where a process dies or a machine is
# lost, all begin again from the newest state, RESTARTS times, and wait up to WAIT seconds for the
# one that is missing: start it again there. SIGTERM and Ctrl-C save first; processes that have not
# ended GRACE seconds later are killed.
#
# Exit codes: 0 done, or out of --minutes; 75 told to stop: the same command goes on; 2 a mistake,
# told in a line, which another try would not mend; 1 given up.
set -u
told='' torchrun='' left=${RESTARTS:-5}
notes=$(mktemp -d)
trap 'rm -rf "$notes"' EXIT
trap 'told=yes; kill -TERM $torchrun 2>/dev/null' INT TERM
export MISTAKE="$notes/mistake" TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-120}"

# torchrun ends with 1 whatever a process ended with, so that a mistake is noted beside it.
# shellcheck disable=SC2016 # for the shell of each process
process='trap : INT TERM; ddt train "$@"; code=$?; [ $code -ne 2 ] || : >"$MISTAKE"; exit $code'
each="--nproc-per-node ${PROCESSES:-auto} --max-restarts 0 --no-python"
place=--standalone
if [ "${NODES:-1}" -gt 1 ]; then
    # Not torchrun's static rendezvous: there a machine that begins again while the others have not
    # noticed joins those that are about to end, and never learns of it.
    first=$([ "$NODE" -eq 0 ] && echo true || echo false) wait=${WAIT:-900}
    place="--nnodes $NODES --rdzv-backend c10d --rdzv-endpoint $HOST:${PORT:-29500}"
    place="$place --rdzv-id ddt --rdzv-conf is_host=$first,join_timeout=$wait,read_timeout=$wait"
fi

while [ -z "$told" ]; do
    # shellcheck disable=SC2086 # several words
    torchrun $place $each sh -c "$process" sh "$@" &
    torchrun=$! code=0
    [ -z "$told" ] || kill -TERM $torchrun
    wait $torchrun || code=$?
    while kill -0 $torchrun 2>/dev/null; do # a signal ends `wait`, not torchrun
        code=0
        wait $torchrun || code=$?
    done
    [ $code -ne 0 ] || exit 0
    [ -z "$told" ] || break
    [ ! -e "$MISTAKE" ] || exit 2
    [ "$left" -gt 0 ] || exit 1
    left=$((left - 1))
    echo "a process or a machine is lost: beginning again from the newest state" >&2
    sleep "${PAUSE:-5}"
done
echo "told to stop: the same command goes on" >&2
exit 75
