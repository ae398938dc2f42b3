# shellcheck shell=bash disable=SC2154
# Sourced by run.sh and test.sh, which set $root: finds a Python and keeps .venv in step with pyproject.toml.
#
# One stamp an extra, .venv/.stamp-EXTRA, is a copy of the pyproject.toml that was installed; it is written last.
# .venv/.installing stands there while pip works: a run that was killed leaves it, and the next one starts afresh.

use_venv() { # use_venv FOLDER [REQUIREMENT...]: what follows is about this folder, with these requirements on top
    venv="$root/$1"
    python="$venv/bin/python"
    pins=("${@:2}")
}
use_venv .venv

oldest_torch() { # the requirement for the oldest torch that pyproject.toml promises
    sed -nE "s/^ *'torch>=([0-9.]+),.*/torch==\\1.*/p" "$root/pyproject.toml"
}

find_python() { # prints the first Python on the PATH that is new enough and can make virtual environments
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo 'nanokron needs Python 3.10 or newer with venv and pip (on Debian and Ubuntu: apt install python3-venv)' >&2
    exit 2
}

list_gpus() { # nvidia-smi hangs where a driver is in trouble
    if command -v timeout >/dev/null; then
        timeout 20 nvidia-smi -L 2>/dev/null
    else
        nvidia-smi -L 2>/dev/null
    fi
}

has_gpu() { # nvidia-smi may be there and list none, or fail in words
    [[ $'\n'$(list_gpus) == *$'\n'GPU\ [0-9]* ]]
}

venv_ready() { # venv_ready EXTRA...: true when every extra was installed from this pyproject.toml
    local extra
    [ ! -e "$venv/.installing" ] || return 1
    for extra in "$@"; do
        cmp -s "$root/pyproject.toml" "$venv/.stamp-$extra" || return 1
    done
    "$python" -c '' 2>/dev/null
}

requirements() { # requirements EXTRA...: one requirement a line; pip ships a TOML reader for Python 3.10
    "$python" - "$root/pyproject.toml" "$@" <<'PYTHON'
import sys
try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib
with open(sys.argv[1], 'rb') as file:
    project = tomllib.load(file)['project']
for extra in sys.argv[2:]:
    print(*(project['dependencies'] if extra == 'base' else project['optional-dependencies'][extra]), sep='\n')
PYTHON
}

has_pip() {
    "$python" -m pip --version >/dev/null 2>&1
}

is_uvs() { # uv sync makes .venv without pip; packages that are missing there are for uv to add
    grep -qs '^uv = ' "$venv/pyvenv.cfg" && ! has_pip && command -v uv >/dev/null
}

pip_install() { # pip_install EXTRA...
    local lines line arguments=() installer=("$python" -m pip install -qq --no-input --disable-pip-version-check)
    if is_uvs; then
        installer=(uv pip install -q --python "$python")
    fi
    lines=$(requirements "$@") || return
    while IFS= read -r line; do
        arguments+=("$line")
    done <<<"$lines"
    arguments+=(${pins[@]+"${pins[@]}"})
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        arguments+=(--extra-index-url "$TORCH_INDEX_URL")
    fi
    "${installer[@]}" "${arguments[@]}" >&2
}

install() { # install EXTRA...: makes or mends $venv; the caller holds the lock
    local extra base
    if [ -e "$venv/.installing" ] || ! { has_pip || is_uvs; }; then
        base=$(find_python) || exit
        rm -rf "$venv"
        mkdir "$venv"
        : >"$venv/.installing"
        echo "making ${venv##*/}, which takes one to five minutes" >&2
        "$base" -m venv "$venv"
    fi
    : >"$venv/.installing"
    trap 'exit 130' INT                      # a pip that was interrupted leaves .installing behind
    if ! pip_install "$@"; then
        rm -f "$venv/.installing"            # pip ended in order, so that the next run need not start afresh
        echo 'the packages that pyproject.toml asks for could not be installed: pip says why above' >&2
        exit 1
    fi
    trap - INT
    rm -f "$venv/.installing"
    for extra in "$@"; do
        cp "$root/pyproject.toml" "$venv/.stamp-$extra"
    done
}

make_venv() { # make_venv EXTRA...: $venv with the runtime packages and these extras, when it has not got them yet
    local base
    if venv_ready base "$@"; then
        return
    fi
    base=$(find_python) || exit
    exec 9>>"$venv.lock"
    # the lock belongs to the open file, so that it outlives this Python and ends with this shell and its pip
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        echo "another run is making ${venv##*/}: waiting for it" >&2
        "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    }
    venv_ready base "$@" || install base "$@"
    exec 9>&-
}
