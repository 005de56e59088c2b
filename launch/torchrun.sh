#!/usr/bin/env bash
# A training that a scheduler may start again and again: on one machine, or on each of several.
#   launch/torchrun.sh --config run.yaml --output_dir /shared/run
#   NODES=2 FIRST=node1 launch/torchrun.sh --config run.yaml --output_dir /shared/run      # on both
# Status 0: done. 75: stopped by a signal and saved, start it again. torchrun's agent runs within the command.
set -euo pipefail

nodes=()
if [ "${NODES:-1}" != 1 ]; then
  : "${FIRST:?with NODES, name the first machine: FIRST=host}"
  nodes=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$FIRST:${PORT:-29400}" --rdzv_id "${JOB:-falcon-qlora}")
fi
exec falcon-qlora train "${nodes[@]}" --resume auto "$@"
