#!/bin/bash
# Make the virtual environment .venv and install requirements.txt in it, unless that is done. Installs nowhere else.
# Run it (`bash launch/setup_env.sh`), or source it and call ensure_venv. PYTHON=... selects the interpreter.

ensure_venv() {
    local root python candidate wanted stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    wanted=$(sha256sum "$root/requirements.txt" | cut -d' ' -f1)
    stamp=$root/.venv/requirements.sha256
    if [ -x "$root/.venv/bin/python" ] && "$root/.venv/bin/python" -c '' 2>/dev/null; then
        [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return 0
    else
        python=
        for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
        done
        if [ -z "$python" ]; then
            echo "error: Python 3.11 or newer is required (python3 is $(python3 --version 2>&1)): install it, or name one with PYTHON=..." >&2
            return 2
        fi
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv --clear "$root/.venv"; then
            rm -rf "$root/.venv"
            echo "error: $python -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2
            return 2
        fi
    fi
    echo "installing requirements.txt into .venv (once; takes minutes)"
    if ! "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"; then
        echo "error: pip could not install requirements.txt (see above): correct the cause and run this again" >&2
        return 2
    fi
    echo "$wanted" >"$stamp"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    ensure_venv
fi
