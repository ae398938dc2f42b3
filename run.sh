#!/usr/bin/env bash
# bash run.sh config/kron_mlp.py [--key=value ...]
#
# Makes .venv if need be, checks the configuration, prepares its data set, trains on every GPU (or in one CPU
# process), and prints a sample. Safe to repeat, from any folder; relative paths in settings start at this one.
# torchrun's flags, before the config or after it, as --name=value with - or _, go to torchrun (docs/distributed.md):
#   bash run.sh config/gpt2_kron_mlp.py --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500
# The sample at the end is printed on the first node.
# --dry_run=True and --eval_only=True end without a sample; --help lists every setting, --help=growth a section.
# Leaves with the exit code of what failed: 2 for a mistake in the configuration, before anything is installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=venv.sh
source "$root/venv.sh"

configure() { # configurator.py needs no package, so that a mistake is told before .venv is made
    "$checker" "$root/configurator.py" "$@"
}

needs_preparing() { # needs_preparing FOLDER: no data yet, or an input.txt was put beside data of the built-in text
    local folder=$1
    [ -f "$folder/prepare.py" ] || return 1
    compgen -G "$folder/*train*.bin" >/dev/null && compgen -G "$folder/*val*.bin" >/dev/null || return 0
    [ -f "$folder/input.txt" ] && grep -qs 'ships with this repository' "$folder/meta.json"
}

prepare() { # prepare FOLDER DRY_RUN: runs the data set's prepare.py when needed
    local folder=$1 dry_run=$2
    needs_preparing "$folder" || return 0
    if grep -Eq '^ *(import|from) datasets' "$folder/prepare.py"; then
        if [ "$dry_run" = True ]; then
            return                           # a dry run starts no download
        fi
        make_venv data
    fi
    "$python" "$folder/prepare.py"
}

gpu_count() { # as torch counts them, which heeds CUDA_VISIBLE_DEVICES; 0 where the driver is too old: train.py says so
    if has_gpu; then
        "$python" -W ignore -c 'import torch; print(torch.cuda.is_available() and torch.cuda.device_count() or 0)'
    else
        echo 0
    fi
}

interrupt() { # interrupt SIGNAL: passes it to the trainer, which saves and leaves
    stopped=1
    caught=1
    if [ -n "$child" ]; then
        kill -s "$1" "$child" 2>/dev/null || true
    fi
}

run_child() { # run_child COMMAND...: in a process group of its own, so that a Ctrl-C reaches it once, through us
    trap 'interrupt INT' INT
    trap 'interrupt TERM' TERM HUP
    set -m
    "$@" &
    child=$!
    set +m
    caught=1
    while [ "$caught" = 1 ]; do              # a signal ends `wait` early
        caught=0
        code=0
        wait "$child" || code=$?
    done
    trap - INT TERM HUP
    return "$code"
}

checker=$python
"$checker" -c '' 2>/dev/null || checker=$(find_python) || exit

is_flag() { # is_flag WORD: torchrun's, in either spelling; none is a setting of ours
    case ${1//_/-} in
        --nnodes=* | --nproc-per-node=* | --node-rank=* | --rdzv-*=* | --max-restarts=* | --standalone) ;;
        --master-addr=* | --master-port=* | --local-addr=* | --monitor-interval=*) ;;
        --shutdown-timeout=* | --start-method=* | --role=* | --log-dir=*) ;;
        --redirects=* | --tee=* | --local-ranks-filter=* | --numa-binding=*) ;;
        *) return 1 ;;
    esac
}

usage='bash run.sh [torchrun flags] config/X.py [--key=value ...]'
flags=()
words=()
for word in "$@"; do
    if is_flag "$word" || { [ ${#words[@]} = 0 ] && [[ $word == --* && $word != --help && $word != --help=* ]]; }; then
        flags+=("$word")
    else
        words+=("$word")
    fi
done
set -- ${words[@]+"${words[@]}"}
if [ $# = 0 ]; then
    echo "usage: $usage" >&2
    exit 2
fi
if [ -f "$1" ] && [ "$PWD" != "$root" ] && [[ $1 != /* ]]; then
    set -- "$PWD/$1" "${@:2}"                # a config beside the user goes before one of ours
fi
cd "$root"

for word in "$@"; do
    case $word in
        -h | --help | --help=*)
            configure --usage="$usage" "$@"
            exit ;;
    esac
done
settings=$(configure --get=dataset --get=data_dir --get=out_dir --get=device --get=dry_run --get=eval_only "$@")
{ read -r dataset; read -r data_dir; read -r out_dir; read -r device; read -r dry_run; read -r eval_only; } \
    <<<"$settings"

make_venv
prepare "$data_dir/$dataset" "$dry_run"

gpus=0
case $device in auto | cuda) gpus=$(gpu_count) ;; esac
launch=("$python")
mark=''
if [ ${#flags[@]} -gt 0 ] || [ "$gpus" -gt 1 ]; then
    launch=("$python" -m torch.distributed.run)
    given=" ${flags[*]-} "
    given=${given//_/-}
    case $given in *' --nproc-per-node='*) ;; *) launch+=(--nproc_per_node="$((gpus > 1 ? gpus : 1))") ;; esac
    case $given in
        *' --nnodes='* | *' --rdzv-'* | *' --master-'* | *' --standalone '*) ;;
        *) launch+=(--standalone) ;;
    esac
    launch+=(${flags[@]+"${flags[@]}"})
    case $given in
        *' --nnodes=1 '* | *' --nnodes=1:1 '*) ;;
        *' --nnodes='*)
            export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1         # a restart with a clean store: see parallel.join
            mark=$(mktemp)                   # rank 0 writes into it, so that one of the nodes knows it has that rank
            trap 'rm -f "$mark"' EXIT
            export NANOKRON_FIRST_NODE=$mark ;;
    esac
fi

stopped=0
child=''
run_child "${launch[@]}" train.py "$@" || exit
if [ "$stopped" = 1 ] || [ "$dry_run" = True ] || [ "$eval_only" = True ] || { [ -n "$mark" ] && [ ! -s "$mark" ]; }; then
    exit 0
fi
sample=(--out_dir="$out_dir" --num_samples=1 --max_new_tokens=300)
case $device in auto) ;; *) sample+=(--device="$device") ;; esac
run_child "$python" sample.py "${sample[@]}"
