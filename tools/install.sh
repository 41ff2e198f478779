#!/bin/sh
# Makes the virtual environment $1 with every package of requirements.lock and this project in it. `make install` calls it.
# PYTHON names the interpreter (default python3); pip's own settings (pip.conf, PIP_*) say where packages come from.
set -eu

UV_VERSION=0.13.9
venv=$1
python=${PYTHON:-python3}

fail() {
    echo "install: $*" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python is not installed; Python 3.11 or newer is needed (or set PYTHON=/path/to/python3.11)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "this Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"

"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet "uv==$UV_VERSION"

# uv does not read pip's settings: hand them over
setting() { "$venv/bin/python" -m pip config get "$1" 2>/dev/null || true; }
give() { # variable of uv, value from pip; what the user has set stays
    eval "old=\${$1:-}"
    [ -n "$old" ] || [ -z "$2" ] || export "$1=$2"
}
give UV_DEFAULT_INDEX "${PIP_INDEX_URL:-$(setting global.index-url)}"
give UV_INDEX "${PIP_EXTRA_INDEX_URL:-$(setting global.extra-index-url)}"
give UV_FIND_LINKS "${PIP_FIND_LINKS:-$(setting global.find-links)}"
[ -z "${UV_INDEX:-}" ] || give UV_INDEX_STRATEGY unsafe-best-match # as pip does: all indexes are equal; versions are pinned
give SSL_CERT_FILE "${PIP_CERT:-$(setting global.cert)}"

# --no-deps: the lock is complete. Compiled here once, since starting SGLang is nearly all imports.
VIRTUAL_ENV=$(cd "$venv" && pwd)
export VIRTUAL_ENV
"$venv/bin/uv" pip install --no-deps --compile-bytecode -r requirements.lock
"$venv/bin/uv" pip install --no-deps --no-build-isolation --editable .
"$venv/bin/uv" pip check
