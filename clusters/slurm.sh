#!/bin/bash
# One sweep on Slurm: Ray starts on every node of the allocation, runs the sweep, and ends with it.
#
#   sbatch clusters/slurm.sh --dataset cifar100 --set runtime.gpus_per_client=0.1
#
# The words after the file are the options of `mosaic sweep`. The same command continues after a time limit or a lost
# node: it computes only what is not in the storage yet. Needs: the environment and the folder of `sbatch` on a file
# system that all nodes share. See docs/CLUSTER.md.

#SBATCH --job-name=mosaic
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
# Add what your site needs, for example:
##SBATCH --partition=gpu
##SBATCH --gpus-per-node=4

set -euo pipefail

# source ~/mosaic-env/bin/activate   # where it is not active at `sbatch`

# Only processes with this token may use Ray's ports, which every user of the cluster can reach.
export RAY_AUTH_MODE=token
if ! [ -e ~/.ray/auth_token ]; then ray get-auth-token --generate > /dev/null; fi
chmod 600 ~/.ray/auth_token

export RAY_TMPDIR=/tmp/mosaic-$SLURM_JOB_ID RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds until all nodes must have come
head=$(python -c 'import ray; print(ray.util.get_node_ip_address())') # this script runs on the first node
export MOSAIC_HEAD=$head:6379

# Each node gives Ray the CPUs and the memory of this job. The first one runs the sweep: a Ray that does not start there
# would otherwise leave the status 0.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none bash -c '
  set -euo pipefail
  limits=$(python -c "from mosaic_ray.execution.ray_session import ray_start_options as own; print(*own())")
  ray symmetric-run --address "$MOSAIC_HEAD" --min-nodes "$SLURM_JOB_NUM_NODES" $limits -- \
    bash -c '\''touch "$RAY_TMPDIR/started"; exec mosaic sweep --address "$MOSAIC_HEAD" "$@"'\'' sweep "$@"
  [ "$SLURM_PROCID" != 0 ] || [ -e "$RAY_TMPDIR/started" ]
  rm -rf "$RAY_TMPDIR"
' node "$@"
