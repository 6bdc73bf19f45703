#!/bin/bash
# Make the virtual environment .venv and install the locked packages in it, unless that is done. Installs nowhere else.
# Run it (`bash launch/setup_env.sh`), or source it and call ensure_venv (with `tests`: the packages of the tests too).
# PYTHON=... selects the interpreter (the locks have wheels for 3.11 to 3.13), PNEUMO_TORCH=cpu or cuda the build of torch.
# Without PNEUMO_TORCH: the build that .venv has, else cuda where this machine or its SLURM cluster has GPUs, else cpu.

_has_gpus() {
    [ "$(uname)" != Linux ] && return 0  # PyPI has one build for other systems
    [ -e /proc/driver/nvidia/version ] && return 0
    command -v sinfo >/dev/null && env -u SINFO_PARTITION timeout 10 sinfo --noheader --format=%G 2>/dev/null | grep gpu >/dev/null
}

_installed_torch() {
    case $("$1" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) in
        *+cpu) echo cpu ;;
        ?*) echo cuda ;;
    esac
}

# Install the packages of lock file $1: each with its hash, from a wheel (a source archive fetches build tools without).
_install() {
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r "$@"
}

_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

ensure_venv() {
    local root python candidate locks installed build name done options hint
    # Packages found or installed elsewhere would not be in .venv, and submit.py would lack them.
    unset PYTHONPATH PYTHONHOME PYTHONUSERBASE PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_PYTHON PIP_DRY_RUN
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    locks=$root/launch/locks
    if ! "$root/.venv/bin/python" -c '' 2>/dev/null; then
        python=
        for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
            if _supported "$candidate"; then python=$candidate; break; fi
        done
        if [ -z "$python" ]; then
            echo "error: Python 3.11, 3.12 or 3.13 is required (python3 is $(python3 --version 2>&1)): install it, or name one with PYTHON=..." >&2
            return 2
        fi
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv --clear "$root/.venv"; then
            rm -rf "$root/.venv"
            echo "error: $python -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2
            return 2
        fi
    fi
    python=$root/.venv/bin/python
    if ! _supported "$python"; then
        echo "error: .venv has $("$python" --version 2>&1), but Python 3.11, 3.12 or 3.13 is required: remove .venv and run this again" >&2
        return 2
    fi
    installed=$(_installed_torch "$python")
    build=${PNEUMO_TORCH:-${installed:-$(_has_gpus && echo cuda || echo cpu)}}
    if [ ! -f "$locks/torch-$build.txt" ]; then
        echo "error: PNEUMO_TORCH=$build is not a build of torch: use cpu or cuda" >&2
        return 2
    fi
    mkdir -p "$root/.venv/locks"
    for name in "torch-$build" common "$@"; do
        done=$root/.venv/locks/${name%%-*}.txt
        cmp -s "$locks/$name.txt" "$done" && continue
        echo "installing launch/locks/$name.txt into .venv (once; may take minutes)"
        options=
        case $name in
            torch-cpu) options="--extra-index-url https://download.pytorch.org/whl/cpu" ;;
            # pip takes an installed CPU build for it: they have the same version.
            torch-cuda) [ "$installed" = cpu ] && options=--force-reinstall ;;
        esac
        if ! _install "$locks/$name.txt" $options; then
            hint=; [ "$name" = torch-cpu ] && hint=" (where only PyPI can be reached: PNEUMO_TORCH=cuda)"
            echo "error: pip could not install launch/locks/$name.txt (see above): correct the cause and run this again$hint" >&2
            return 2
        fi
        cp "$locks/$name.txt" "$done"
    done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    ensure_venv "$@"
fi
