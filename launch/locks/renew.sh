#!/bin/bash
# Write the lock files anew from requirements.txt and tests/requirements.txt: every package that they bring, with the
# hashes of its files. Arguments go to uv: --upgrade, or --upgrade-package NAME; without any, only what the two files
# ask for changes. Needs what tests/run.sh installs, PyPI, and PyTorch's index of CPU builds.
set -euo pipefail
cd "$(dirname "$0")/../.."
locks=launch/locks
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() {
    .venv/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --fork-strategy fewest --only-binary :all: \
        --generate-hashes --no-header --no-annotate "$@"
}

# Write lock file $1 from the packages on standard input for which the awk condition $2 on `name` holds.
write() {
    {
        echo "# Made by launch/locks/renew.sh: do not edit."
        awk "/^[a-z0-9]/ { name = \$1; sub(/==.*/, \"\", name); keep = ($2) } keep"
    } >"$work/new"
    mv "$work/new" "$locks/$1.txt"
}

only_gpu='name ~ /^(torch|triton|nvidia-.*|cuda-.*)$/'
cat "$locks"/{common,torch-cuda}.txt >"$work/product.txt" 2>/dev/null || true
cat "$locks"/{common,torch-cuda,tests}.txt >"$work/all.txt" 2>/dev/null || true
compile requirements.txt -o "$work/product.txt" "$@" >/dev/null
compile requirements.txt tests/requirements.txt -c "$work/product.txt" -o "$work/all.txt" "$@" >/dev/null
grep -E '^torch==' requirements.txt | sed 's/$/+cpu/' >"$work/torch-cpu.in"
compile "$work/torch-cpu.in" --no-deps --default-index https://download.pytorch.org/whl/cpu -o "$work/torch-cpu.txt" >/dev/null

product=$(sed -n 's/^\([a-z0-9][^=]*\)==.*/ \1 /p' "$work/product.txt" | tr -d '\n')
write common "!($only_gpu)" <"$work/product.txt"
write torch-cuda "$only_gpu" <"$work/product.txt"
write torch-cpu 1 <"$work/torch-cpu.txt"
write tests "!index(\"$product\", \" \" name \" \")" <"$work/all.txt"
