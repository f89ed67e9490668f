#!/usr/bin/env bash
# Train on two hosts without a scheduler: the language model sharded over the GPUs of a host, one copy on each.
#
#   scripts/two_hosts.sh 0 10.0.0.1 --model ... --output-dir /shared/runs/x --resume     on the first host
#   scripts/two_hosts.sh 1 10.0.0.1 --model ... --output-dir /shared/runs/x --resume     on the second
#
# The arguments are the host's number, the first host's address as the second one reaches it, and the flags of
# bigsae.train, the same on both. The output folder lies on a file system that both see; so does a local dataset.
#
#   PROCESSES_PER_HOST   ranks, one for each GPU (default 8)
#   MAIN_PORT            a port that is free on the first host (default 29500)
#   ACCELERATE_CONFIG    how the model is held (default accelerate_configs/hsdp_2nodes.yaml)
#
# Where a host has several networks, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface between the two.
set -euo pipefail

if [[ $# -lt 2 || ! "$1" =~ ^[01]$ || "$2" == -* ]]; then
    echo "usage: two_hosts.sh 0|1 ADDRESS_OF_HOST_0 [flags of bigsae.train]" >&2
    exit 2
fi
machine_rank="$1" main_ip="$2"
shift 2
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

exec accelerate launch \
    --config_file "${ACCELERATE_CONFIG:-$root/accelerate_configs/hsdp_2nodes.yaml}" \
    --num_machines 2 --num_processes "$((2 * ${PROCESSES_PER_HOST:-8}))" \
    --machine_rank "$machine_rank" --main_process_ip "$main_ip" --main_process_port "${MAIN_PORT:-29500}" \
    -m bigsae.train "$@"
