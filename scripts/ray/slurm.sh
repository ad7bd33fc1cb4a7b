#!/usr/bin/env bash
# Starts a Ray cluster on the nodes of a Slurm job and runs predictions on it.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/ray/slurm.sh google-bert/bert-base-cased --task fill-mask \
#       --input /share/texts --format parquet --output /share/predictions
#
# When the job is submitted, the virtual environment with bert-jax[ray] must be active. It must be on a disk that all nodes
# share. If the job is stopped, submit the same command again. Rows that have been written are not computed again.
#SBATCH --exclusive --ntasks-per-node=1
set -euo pipefail
head="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?run this with sbatch}" | head -n 1)"
address="$head:6379"
gpus="${SLURM_GPUS_ON_NODE:-0}"
srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$head" --port=6379 --num-gpus="$gpus" --disable-usage-stats --block &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes="$((SLURM_JOB_NUM_NODES - 1))" --exclude="$head" \
        bash -c "until ray start --address=$address --num-gpus=$gpus --disable-usage-stats --block; do sleep 5; done" &
fi
missing="import ray; ray.init('$address'); exit(sum(node['Alive'] for node in ray.nodes()) < $SLURM_JOB_NUM_NODES)"
until srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" python -c "$missing"; do sleep 5; done
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" bert-jax predict "$@" --engine ray --address "$address"
