#!/bin/sh
# Joins this machine to the Ollama Coordinator at @URL:
#   @CURL | sh
# The same line again starts the agent again, in the version of its coordinator.
# JOIN_FOLDER is another folder; with JOIN_START=no nothing is started.
set -eu

url='@URL'
common='@COMMON'
agent='@AGENT'
version='@VERSION'
# The public key and the SHA-256 of a certificate that the coordinator has made itself.
pin='@PIN'
certificate='@CERTIFICATE'
folder="${JOIN_FOLDER:-${XDG_DATA_HOME:-${HOME:?is not set}/.local/share}/ollama-coordinator-agent}"
start="${JOIN_START:-yes}"

fail() { echo "join: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
fetch() {
    if has curl; then curl -fsSL ${pin:+-k --pinnedpubkey "$pin"} -o "$2" "$1"
    else wget -q ${pin:+--no-check-certificate "--pinnedpubkey=$pin"} -O "$2" "$1"; fi ||
        fail "$1 cannot be fetched"
}

main() {
    python=''
    for name in python3 python3.13 python3.12 python3.11 python; do
        if has "$name" && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
        then python=$name; break; fi
    done
    if has uv; then tool=uv
    elif [ -n "$python" ]; then tool=pip
    else fail "this needs Python 3.11 or later, or uv (https://docs.astral.sh/uv/)"; fi

    echo "This machine joins the Ollama Coordinator at $url."
    echo "  1. The agent, version $version, is installed with $tool into $folder"
    echo "     (its own environment; aiohttp and the others come from your package index)."
    if [ "$start" = no ]; then echo "  2. Nothing is started."
    else echo "  2. $folder/bin/ollama-coordinator-agent starts here, until Ctrl-C."; fi
    echo "Nothing else is changed. To undo it, delete that folder."

    mkdir -p "$folder"
    got=$(mktemp -d)
    trap 'rm -rf "$got"' EXIT
    trap 'exit 1' HUP INT TERM
    fetch "$url/join/$common" "$got/$common"
    fetch "$url/join/$agent" "$got/$agent"
    at="$folder/bin/python"
    if [ "$tool" = uv ]; then
        "$at" -c '' 2>/dev/null || uv venv -q --clear -p "${python:->=3.11}" "$folder"
        uv pip install -q --python "$at" --reinstall-package ollama-coordinator-common \
            --reinstall-package ollama-coordinator-agent "$got/$common" "$got/$agent"
        # It halves what a link costs; where there is none for this machine, all works without.
        uv pip install -q --python "$at" --only-binary uvloop 'uvloop>=0.21' 2>/dev/null || true
    else
        "$at" -c '' 2>/dev/null || "$python" -m venv --clear --without-pip "$folder"
        # Debian's Python has no pip; pip runs from its own wheel.
        fetch "$url/join/pip.whl" "$got/pip.whl"
        pip() { PYTHONPATH="$got/pip.whl" "$at" -m pip --disable-pip-version-check "$@"; }
        # Another build of the same version replaces the one that is there.
        pip install -q --no-deps --force-reinstall "$got/$common" "$got/$agent"
        pip install -q "$got/$common" "$got/$agent"
        pip install -q --only-binary uvloop 'uvloop>=0.21' 2>/dev/null || true
    fi
    rm -rf "$got"
    printf '%s\n' "$url" "$certificate" > "$folder/joined-to"
    [ "$start" != no ] || exit 0
    export COORDINATOR_URL="$url"
    [ -z "$certificate" ] || export COORDINATOR_CERTIFICATE="$certificate"
    exec "$folder/bin/ollama-coordinator-agent"
}

main
