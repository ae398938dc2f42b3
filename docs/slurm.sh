#!/usr/bin/env bash
# sbatch docs/slurm.sh config/train_gpt2.py [--key=value ...], from the root of the repository, .venv made before
# (bash run.sh config/train_gpt2.py --dry_run=True makes it). The repository and out_dir must lie where all nodes see them.
#SBATCH --job-name=nanokron
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@120
# TERM two minutes before the end: training saves and leaves with 0; go on by --init_from=resume
set -euo pipefail

gpus=8                                       # a node; as in --gpus-per-node
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# one torchrun a node (--ntasks-per-node=1); the job's number tells this launch from others after a restart
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # so that a restart does not find the addresses of dead ranks (docs/distributed.md)
srun .venv/bin/python -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$gpus" --max-restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" --rdzv_id="$SLURM_JOB_ID" \
    train.py "$@"
