#!/bin/bash
#SBATCH --job-name=klq
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.out
#SBATCH --requeue
# sbatch examples/launch/slurm.sh [--name value ...]: one launcher per node, a process per GPU. Further arguments go to
# `klq train`. A job that was requeued goes on from its last complete checkpoint (resume: true in the config).
set -euo pipefail

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
GPUS=${SLURM_GPUS_ON_NODE:-8}

# $SLURM_NODEID is that of each task, so the command is quoted for srun's shell
srun bash -c 'exec accelerate launch --config_file '"${LAUNCH:-examples/launch/fsdp2.yaml}"' \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes '"$((GPUS * SLURM_NNODES))"' \
  --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  -m klq_kernels train --config '"${CONFIG:-examples/train_klq.yaml}"' "$@"' klq "$@"
