#!/bin/sh
# install.sh [--gpu] [--dry-run] VENV
# Makes the virtual environment VENV with every package of requirements.lock and this project in it. `make install` calls it.
# --gpu: adds what GPU hosts need besides (requirements-gpu.lock) to a VENV that was made before. `make install-gpu` calls it.
# --dry-run: prints the commands that change something, and runs none of them.
# PYTHON names the interpreter (default python3); pip's own settings (pip.conf, PIP_*) say where packages come from.
set -eu

UV_VERSION=0.13.9
python=${PYTHON:-python3}
gpu='' dry=''

fail() {
    echo "install: $*" >&2
    exit 1
}

run() { # a command that changes something
    if [ -n "$dry" ]; then
        echo "+ $*"
    else
        "$@"
    fi
}

while [ $# -gt 1 ]; do
    case $1 in
    --gpu) gpu=yes ;;
    --dry-run) dry=yes ;;
    *) fail "unknown option $1; install.sh [--gpu] [--dry-run] VENV" ;;
    esac
    shift
done
[ $# -eq 1 ] || fail "install.sh [--gpu] [--dry-run] VENV"
venv=$1

make_venv() {
    command -v "$python" >/dev/null ||
        fail "$python is not installed; Python 3.11 or newer is needed (or set PYTHON=/path/to/python3.11)"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old; Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"

    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || run "$python" -m venv --clear "$venv"
    run "$venv/bin/python" -m pip install --quiet "uv==$UV_VERSION"
}

# uv does not read pip's settings: hand them over
setting() { "$venv/bin/python" -m pip config get "$1" 2>/dev/null || true; }
give() { # variable of uv, value from pip; what the user has set stays
    eval "old=\${$1:-}"
    [ -n "$old" ] || [ -z "$2" ] || export "$1=$2"
}
use_pips_settings() {
    give UV_DEFAULT_INDEX "${PIP_INDEX_URL:-$(setting global.index-url)}"
    give UV_INDEX "${PIP_EXTRA_INDEX_URL:-$(setting global.extra-index-url)}"
    give UV_FIND_LINKS "${PIP_FIND_LINKS:-$(setting global.find-links)}"
    [ -z "${UV_INDEX:-}" ] || give UV_INDEX_STRATEGY unsafe-best-match # as pip does: all indexes are equal; versions are pinned
    give SSL_CERT_FILE "${PIP_CERT:-$(setting global.cert)}"
    VIRTUAL_ENV=$(cd "$venv" 2>/dev/null && pwd) || VIRTUAL_ENV=$venv
    export VIRTUAL_ENV
}

install_all() { # --no-deps: the lock is complete. Compiled here once, since starting SGLang is nearly all imports.
    run "$venv/bin/uv" pip install --no-deps --compile-bytecode -r requirements.lock
    run "$venv/bin/uv" pip install --no-deps --no-build-isolation --editable .
    run "$venv/bin/uv" pip check
}

install_gpu() {
    [ -x "$venv/bin/uv" ] || fail "$venv is not complete; run \`make install\` first"
    [ -n "$dry" ] || "$venv/bin/python" - <<'CHECK' || exit 1
import sys
from ctpo_megatron.engine.toolkit import check_toolkit
from ctpo_megatron.errors import InputError

try:
    check_toolkit()
except InputError as error:
    sys.exit(f"install: {error}")
CHECK
    pins=$(grep '==' requirements-gpu.lock | grep -v '^#')
    source=$(echo "$pins" | grep '^transformer-engine-torch==')
    # shellcheck disable=SC2086 # one word per package
    run "$venv/bin/uv" pip install --no-deps --only-binary :all: $(echo "$pins" | grep -v '^transformer-engine-torch==')

    # Built with the torch that is here, never with the newest of the index, and not taken from a cache that may hold a build
    # against another torch. cuDNN's header comes with torch, beside the toolkit.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    run env NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE "CPATH=$site/nvidia/cudnn/include${CPATH:+:$CPATH}" \
        "$venv/bin/uv" pip install --no-deps --no-build-isolation --no-cache --reinstall-package transformer-engine-torch "$source"
    run "$venv/bin/uv" pip check
    if [ -e /dev/nvidiactl ]; then
        run "$venv/bin/python" -c 'import transformer_engine.pytorch'
    else
        echo "install: this machine has no NVIDIA driver; \`ctpo doctor\` on one that has tells whether TransformerEngine loads"
    fi
    cat <<'LEFT_OUT'
install: left out, since nothing here needs them beside TransformerEngine:
  apex        not on PyPI (the package of that name there is another one, which breaks Megatron-Core)
  flash-attn  comes as source and takes hours to build; TransformerEngine uses cuDNN's attention
LEFT_OUT
}

if [ -n "$gpu" ]; then
    use_pips_settings
    install_gpu
else
    make_venv
    use_pips_settings
    install_all
fi
