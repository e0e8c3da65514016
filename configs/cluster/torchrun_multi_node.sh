#!/usr/bin/env bash
# Start this on every node at about the same time, from the repository, with the same arguments:
#
#   RUN_ID=sft-3 HEAD_NODE=node0 NUM_NODES=4 bash configs/cluster/torchrun_multi_node.sh \
#       configs/sdar_8b_multinode.yaml [key=value ...]
#
# HEAD_NODE       name or address of one of the nodes, reachable from all (required)
# NUM_NODES       number of nodes (required)
# RUN_ID          name of this run, the same on all nodes (required): a start with the name of the
#                 run in output_dir goes on from its newest intact checkpoint, another one begins as
#                 the configuration says
# NPROC_PER_NODE  processes of a node: its GPUs (default 8)
# HEAD_PORT       a free port of HEAD_NODE (default 29500)
# MAX_RELAUNCHES  how often a node starts torchrun again after it failed (default 10; 0 while you
#                 try things out, or a wrong key is reported eleven times)
# RELAUNCH_DELAY  seconds before that, in which the other nodes notice, too (default 15)
# TORCHRUN_ARGS   more options of torchrun
#
# Ranks follow from the rendezvous (c10d), so no node needs a number. After a failure of any process,
# host or link torchrun ends on all nodes and is started again here, since restarts within torchrun
# (--max_restarts) get out of step between nodes that lost each other. A node that cannot reach
# HEAD_NODE tries for a minute each time. output_dir, data and model must be on storage that all
# nodes see.
#
# SIGUSR1 and SIGTERM to this script: the run saves the step that it is in and ends, on all nodes;
# torchrun gives it 30 s after SIGTERM, as long as it takes after SIGUSR1.
#
# Where nodes have several network interfaces, say which one to use, for NCCL and for gloo, which
# carries control messages and checkpoints:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# NCCL_DEBUG=INFO prints the transport that NCCL chose (NET/IB: InfiniBand or RoCE; NET/Socket: TCP).
set -uo pipefail

: "${HEAD_NODE:?set it to the name or address of one of the nodes}"
: "${NUM_NODES:?set it to the number of nodes}"
: "${RUN_ID:?set it to a name of this run, the same on all nodes}"
if [ "$#" -eq 0 ]; then
    echo "usage: RUN_ID=... HEAD_NODE=... NUM_NODES=... $0 CONFIG.yaml [key=value ...]" >&2
    exit 2
fi

# One thread per process: GPUs do the work, and rows are made by one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

torchrun_pid=""
asked_to_stop=""
interrupted=""

stop() {
    asked_to_stop=yes
    interrupted=yes
    # To the training processes alone: torchrun itself does not know SIGUSR1.
    [ -n "$torchrun_pid" ] && pkill -USR1 -P "$torchrun_pid"
}
trap stop USR1 TERM

launch() {
    # A signal to the whole process group must not end torchrun, whose processes are to save.
    (trap '' USR1 && exec torchrun \
        --nnodes "$NUM_NODES" \
        --nproc_per_node "${NPROC_PER_NODE:-8}" \
        --rdzv_backend c10d \
        --rdzv_endpoint "$HEAD_NODE:${HEAD_PORT:-29500}" \
        --rdzv_id "$RUN_ID" \
        --max_restarts 0 \
        ${TORCHRUN_ARGS:-} \
        pretrain_sdar.py "$@" "job_id=$RUN_ID") &
    torchrun_pid=$!
    while :; do
        interrupted=""
        wait "$torchrun_pid"
        code=$?
        [ -z "$interrupted" ] && break  # else it was a signal that ended the waiting
    done
    torchrun_pid=""
}

for ((relaunch = 0; ; relaunch++)); do
    code=0
    launch "$@"
    if [ "$code" -eq 0 ] || [ -n "$asked_to_stop" ] || [ "$relaunch" -ge "${MAX_RELAUNCHES:-10}" ]; then
        exit "$code"
    fi
    delay="${RELAUNCH_DELAY:-15}"
    echo "$(hostname): torchrun ended with exit code $code; relaunch $((relaunch + 1)) of" \
        "${MAX_RELAUNCHES:-10} in $delay s" >&2
    sleep "$delay" & wait $!
    if [ -n "$asked_to_stop" ]; then exit "$code"; fi
done
