#!/usr/bin/env bash
# The hyperparameter search on a Slurm cluster. From the project's folder:
#
#   sbatch vae_hyperband/slurm_job.sh                                   # a first run, no edit needed
#   sbatch --nodes=4 --cpus-per-task=16 vae_hyperband/slurm_job.sh --num-trials 64 --max-epochs 27
#   sbatch --gres=gpu:2 vae_hyperband/slurm_job.sh --device cuda --gpus-per-trial 0.25
#
# Options before the script are Slurm's, options after it are those of "vae-hyperband search".
# Before the time limit the search is stopped in order, the job goes back to the queue, and the same
# job goes on. The project's folder has to be on storage that all nodes share.
#
# Environment variables: RUN (name of the search), VENV (virtual environment, default .venv) or
# CONDA_ENV (conda environment), MODULES (modules to load first, such as "python/3.11 cuda/12.4").
#
#SBATCH --job-name=vae-hyperband
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

: "${SLURM_JOB_ID:?Start this with sbatch; without a cluster run: vae-hyperband search}"
cd "${SLURM_SUBMIT_DIR:-.}"
RUN=${RUN:-search-$SLURM_JOB_ID}
mkdir -p logs
log=logs/slurm-$SLURM_JOB_ID.log
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST writes to $PWD/$log"
exec >>"$log" 2>&1
echo "$(date -Is) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"

# --- the environment: modules, then conda or a virtual environment, made if it is missing ---------
for module in ${MODULES:-}; do
    module load "$module"
done
if [[ -n ${CONDA_ENV:-} ]]; then
    set +u # conda's own scripts read variables that are not set
    # shellcheck disable=SC1091  # where conda lies is known on the cluster only
    source "$(conda info --base)/etc/profile.d/conda.sh"
    conda env list | grep -q "^$CONDA_ENV " || conda create -y -n "$CONDA_ENV" python=3.11
    conda activate "$CONDA_ENV"
    set -u
    command -v vae-hyperband >/dev/null || make setup VENV="$CONDA_PREFIX"
else
    VENV=${VENV:-.venv}
    make setup VENV="$VENV"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi

# --- a Ray of this job alone: its own port, token and folder ----------------------------------------
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
head_ip=$(getent ahostsv4 "$address" | awk 'NR == 1 {print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))
folder=/tmp/vae-ray-$SLURM_JOB_ID  # short: the paths of its sockets may have 107 bytes at most
# Ray has no authentication unless told so; without it, everyone who reaches the port runs code here
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

background=()
# shellcheck disable=SC2317  # the trap calls it
end() {
    # only what this job started: "ray stop" would end other jobs' Ray on the same node, too
    for process in "${background[@]}"; do
        kill "$process" 2>/dev/null || true
    done
    wait
    rm -rf "$folder"
}
trap end EXIT

on_node() { # on_node NODE RAY_START_OPTION ...: Ray on one node, in the background
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" -w "$node" \
        ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
        --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats "$@" >/dev/null &
    background+=($!)
}

on_node "$head" --head --node-ip-address="$head_ip" --port="$port" --temp-dir="$folder" \
    --include-dashboard=false
for ((try = 0; try < 60; try++)); do
    ray health-check --address "$head_ip:$port" 2>/dev/null && break
    sleep 1
done
for node in "${nodes[@]:1}"; do
    on_node "$node" --address="$head_ip:$port"
done
python3 - "$head_ip:$port" "${#nodes[@]}" <<'PYTHON'
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
deadline = time.monotonic() + 120
while len([n for n in ray.nodes() if n["Alive"]]) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(f"only {len(ray.nodes())} of {sys.argv[2]} nodes joined Ray within 2 minutes")
    time.sleep(0.5)
print(f"Ray runs on {sys.argv[2]} node(s): {ray.cluster_resources().get('CPU', 0):g} CPUs, "
      f"{ray.cluster_resources().get('GPU', 0):g} GPUs", flush=True)
PYTHON

# --- the same search as everywhere ----------------------------------------------------------------
vae-hyperband search --run "$RUN" --address "$head_ip:$port" "$@" &
driver=$!
# bash runs a trap only between commands, so the driver has to be in the background
trap 'echo "$(date -Is) time is nearly up: stopping in order"; kill -USR1 "$driver"' USR1
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do # wait returned because of the signal, not of the end
    status=0
    wait "$driver" || status=$?
done
if ((status == 75)); then # stopped and saved: see vae-hyperband --help
    echo "$(date -Is) back to the queue; the search goes on where it stopped"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
