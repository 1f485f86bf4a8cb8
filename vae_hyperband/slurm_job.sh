#!/usr/bin/env bash
# The hyperparameter search on a Slurm cluster. In the environment that has the package:
#
#   vae-hyperband slurm > slurm_job.sh    # prints this script
#   sbatch slurm_job.sh                   # works without any edit
#   sbatch --nodes=4 --cpus-per-task=16 slurm_job.sh --num-trials 64 --max-epochs 27
#   sbatch --gres=gpu:2 slurm_job.sh --device cuda --gpus-per-trial 0.25
#   sbatch --array=0-4 slurm_job.sh       # five searches, seeds 0 to 4
#
# Options before the script are Slurm's, options after it are those of "vae-hyperband search".
# Before the time limit the search saves and stops, the job is requeued, and the same job continues.
# The folder that sbatch is called in has to be on storage that all nodes share.
#
# Environment variables, all optional (sbatch passes them on):
#   RUN         name of the search (default search-JOBID; in an array search-ARRAYID-seed-N)
#   SEARCH      more options of "vae-hyperband search", in one string
#   VENV        virtual environment (in a clone of the repository .venv by default; created there if
#               missing; elsewhere the environment that sbatch was called in), or instead
#   CONDA_ENV   conda environment (in a clone created if missing)
#   MODULES     modules to load first, such as "python/3.11 cuda/12.4"
#   RAY_PORT    port of this job's Ray (default: derived from the job's number)
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

: "${SLURM_JOB_ID:?Start this with sbatch; without a cluster, run vae-hyperband search}"
cd "${SLURM_SUBMIT_DIR:-.}"
read -ra options <<<"${SEARCH:-}"
options+=("$@")
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    RUN=${RUN:-search-$SLURM_ARRAY_JOB_ID}-seed-$SLURM_ARRAY_TASK_ID
    options+=(--seed "$SLURM_ARRAY_TASK_ID")
fi
RUN=${RUN:-search-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
mkdir -p logs
mark=logs/.slurm-$SLURM_JOB_ID
if [[ -e $mark.begun ]]; then # continue what this job began, do not move it aside
    kept=()
    for option in ${options[@]+"${options[@]}"}; do
        [[ $option == --fresh ]] || kept+=("$option")
    done
    options=(${kept[@]+"${kept[@]}"})
fi
log=logs/slurm-$SLURM_JOB_ID.log
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST writes to $PWD/$log"
exec >>"$log" 2>&1
say() { echo "$(date -Is) $*"; }
say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts, search $RUN"

driver=
stop_asked=
# shellcheck disable=SC2317  # the trap calls it
on_usr1() { # Slurm may send it up to a minute early, in a short job before the search starts
    say "the time limit is near: saving, then stopping"
    stop_asked=1
    [[ -z $driver ]] || kill -USR1 "$driver"
}
trap on_usr1 USR1
back_to_the_queue() {
    say "requeueing: $1"
    scontrol requeue "$SLURM_JOB_ID"
}
broke_down() { # finished work is on disk, so try again, but not forever
    echo "$1" >>"$mark.broken"
    (($(wc -l <"$mark.broken") > 5)) || back_to_the_queue "$1"
}

# --- the environment: modules, then conda or a virtual environment, created if missing ------------
for module in ${MODULES:-}; do
    module load "$module"
done
clone= # of the repository, where make can make the environment
[[ ! -e Makefile || ! -e constraints.txt || ! -e vae_hyperband/slurm_job.sh ]] || clone=1
exec 9>logs/.setup.lock # jobs of an array start together
flock 9
if [[ -n ${CONDA_ENV:-} ]]; then
    set +u # conda's own scripts read variables that are not set
    # shellcheck disable=SC1091  # only the cluster knows where conda lies
    source "$(conda info --base)/etc/profile.d/conda.sh"
    conda env list | grep -q "^$CONDA_ENV " || conda create -y -n "$CONDA_ENV" python=3.12
    conda activate "$CONDA_ENV"
    set -u
    [[ -z $clone ]] || command -v vae-hyperband || make setup VENV="$CONDA_PREFIX"
else
    [[ -z $clone ]] || make setup VENV="${VENV:=.venv}"
    # shellcheck disable=SC1091
    [[ ! -e ${VENV:-}/bin/activate ]] || source "$VENV/bin/activate"
fi
if ! command -v vae-hyperband || ! command -v ray; then
    say "this environment lacks vae-hyperband[search]: activate one that has it, then sbatch"
    exit 2
fi
exec 9>&-

# --- a Ray of this job alone: its own port, token and folder ----------------------------------------
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
head_ip=$(getent ahostsv4 "$address" | awk 'NR == 1 {print $1}')
port=${RAY_PORT:-$((10000 + SLURM_JOB_ID % 10000))} # below the ports that the system assigns itself
folder=/tmp/vae-ray-$SLURM_JOB_ID # short: socket paths may have at most 107 bytes
rm -rf "$folder" "$folder.over" # left by a start that was killed
# by default Ray has no authentication: everyone who reaches its port could run code here
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

background=()
# shellcheck disable=SC2317  # the trap calls it
end() {
    local status=$?
    [[ -n $driver || -n $stop_asked ]] || broke_down "Ray did not start (status $status)"
    # only what this job started: "ray stop" would also end the Ray of other jobs on the node
    touch "$folder.over"
    for process in ${background[@]+"${background[@]}"}; do
        kill "$process" 2>/dev/null || true
    done
    wait
    rm -rf "$folder" "$folder.over"
}
trap end EXIT

on_node() { # on_node NODE RAY_START_OPTION ...: Ray on one node, in the background
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" -w "$node" \
        ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" \
        --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats \
        --min-worker-port=0 --max-worker-port=0 "$@" >/dev/null &
}

on_node "$head" --head --node-ip-address="$head_ip" --port="$port" --temp-dir="$folder" \
    --ray-client-server-port="$((port + 10001))" --include-dashboard=false
background+=($!)
for ((try = 0; try < 60; try++)); do
    ray health-check --address "$head_ip:$port" 2>/dev/null && break
    sleep 1
done
for node in "${nodes[@]:1}"; do
    ( # a node whose Ray dies gets a new one
        trap 'kill "$!" 2>/dev/null; exit' TERM
        until [[ -e $folder.over ]]; do
            on_node "$node" --address="$head_ip:$port"
            wait "$!" || true
            sleep 2
        done
    ) &
    background+=($!)
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
if [[ -n $stop_asked ]]; then
    back_to_the_queue "there was no time to start"
    exit 75
fi
# bash runs a trap only between commands, so the driver has to be in the background
touch "$mark.begun"
vae-hyperband search --run "$RUN" --address "$head_ip:$port" ${options[@]+"${options[@]}"} &
driver=$!
[[ -z $stop_asked ]] || kill -USR1 "$driver" # it came just now
status=0
wait "$driver" || status=$?
while kill -0 "$driver" 2>/dev/null; do # a signal ended wait, not the driver's end
    status=0
    wait "$driver" || status=$?
done
if ((status > 128)); then # may be the signal's number, if the driver ended at that moment
    again=0
    wait "$driver" || again=$?
    ((again == 127)) || status=$again
fi
case $status in
75) back_to_the_queue "the search will continue" ;; # see vae-hyperband --help
0 | 2 | 3) ;; # done; invalid options; every trial failed
*) broke_down "the search ended with status $status" ;;
esac
exit "$status"
