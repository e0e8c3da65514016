#!/usr/bin/env bash
# Start this on every node at about the same time, from the repository, with the same arguments:
#
#   HEAD_NODE=node0 NUM_NODES=4 bash configs/cluster/torchrun_multi_node.sh \
#       configs/sdar_8b_multinode.yaml [key=value ...]
#
# HEAD_NODE       name or address of one of the nodes, reachable from all (required)
# NUM_NODES       number of nodes (required)
# NPROC_PER_NODE  processes of a node: its GPUs (default 8)
# HEAD_PORT       a free port of HEAD_NODE (default 29500)
# RUN_ID          the same on all nodes, different for runs at the same time (default sdar)
# MAX_RESTARTS    how often all processes start again after one failed (default 3; 0 while you try
#                 things out, or a wrong key is reported four times)
#
# Ranks follow from the rendezvous (c10d), so no node needs a number. After a failure torchrun starts
# all processes again, and they go on from the newest intact checkpoint, as long as
# overwrite_output_dir is false. output_dir, data and model must be on storage that all nodes see.
#
# Where nodes have several network interfaces, say which one to use, for NCCL and for gloo, which
# carries control messages and checkpoints:
#   export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# NCCL_DEBUG=INFO prints the transport that NCCL chose (NET/IB: InfiniBand or RoCE; NET/Socket: TCP).
set -euo pipefail

: "${HEAD_NODE:?set it to the name or address of one of the nodes}"
: "${NUM_NODES:?set it to the number of nodes}"
if [ "$#" -eq 0 ]; then
    echo "usage: HEAD_NODE=... NUM_NODES=... $0 CONFIG.yaml [key=value ...]" >&2
    exit 2
fi

# One thread per process: GPUs do the work, and rows are made by one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --nnodes "$NUM_NODES" \
    --nproc_per_node "${NPROC_PER_NODE:-8}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$HEAD_NODE:${HEAD_PORT:-29500}" \
    --rdzv_id "${RUN_ID:-sdar}" \
    --max_restarts "${MAX_RESTARTS:-3}" \
    pretrain_sdar.py "$@"
