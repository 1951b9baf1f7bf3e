# Makes and activates the Python environment that quickstart.sh, test.sh and .ci/run share. Sourced by them, from the repository root.
#
#   LLAVA_SAEP_VENV     where the environment lives (default: .venv in the repository)
#   LLAVA_SAEP_PYTHON   which interpreter makes it (default: the first of python3, python3.11 ... python3.14 that will do)
#
# The environment is made once. A stamp inside it remembers setup.cfg and the constraints, and which extras of setup.cfg
# are there; while they stay the same, nothing is installed or downloaded again, so later runs work offline.

say() { printf '\n\033[1m==> %s\033[0m\n' "$*"; }
fail() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

# Prints the interpreter to use. One that can already import a recent torch wins; else the first that is new enough.
find_python() {
    local candidate path first=""
    for candidate in ${LLAVA_SAEP_PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        "$path" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
        [ -n "$first" ] || first=$path
        if installed_torch "$path" >/dev/null; then
            echo "$path"
            return 0
        fi
    done
    [ -n "$first" ] && echo "$first"
}

# Prints "<version> <folder>" of a torch that $1 can already import and that is recent enough for setup.cfg.
installed_torch() {
    "$1" - 2>/dev/null <<'PY'
import importlib.metadata, importlib.util, pathlib, sys
spec = importlib.util.find_spec("torch")
version = importlib.metadata.version("torch") if spec else "0"
if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 10):
    sys.exit(1)
print(version.split("+")[0], pathlib.Path(spec.origin).parent.parent)
PY
}

# What the environment was made from. A change of any of these files makes it out of date.
environment_stamp() { cat setup.cfg pyproject.toml constraints.txt | cksum; }

# Makes an empty environment, next to a torch that is already there. The marker file says that the folder is ours.
create_environment() {
    local python=$1 venv=$2 torch_here torch_version torch_folder
    say "Making a Python environment in $venv ($("$python" --version), $python)"
    if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ] && [ ! -f "$venv/made_by_llava_saep" ]; then
        fail "$venv exists and was not made by this script. Remove it, or name another folder with LLAVA_SAEP_VENV."
    fi
    # The marker first: what a kill leaves half made is ours too.
    mkdir -p "$venv"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name made_by_llava_saep -exec rm -rf {} +
    pwd >"$venv/made_by_llava_saep"
    "$python" -m venv "$venv" || fail "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv"

    if torch_here=$(installed_torch "$python"); then
        torch_version=${torch_here%% *} torch_folder=${torch_here#* }
        echo "Reusing torch $torch_version from $torch_folder: no other build is fetched."
        # A path file rather than --system-site-packages: it also reaches the packages of an active virtual environment.
        echo "$torch_folder" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused_torch.pth"
    fi
}

# Which of the extras $2... the environment $1 lacks, and those that it has, all with commas; nothing if it lacks none.
# A change of what environments are made from (see environment_stamp) makes it lack all that it has.
extras_to_install() {
    local venv=$1 has="" extra lacks_one=""
    shift
    [ ! -f "$venv/llava_saep.stamp" ] || has=$(sed -n 2p "$venv/llava_saep.stamp")
    [ "$(head -n 1 "$venv/llava_saep.stamp" 2>/dev/null)" = "$(environment_stamp)" ] || lacks_one=yes
    for extra in "$@"; do
        case ",$has," in
            *",$extra,"*) ;;
            *) has=${has:+$has,}$extra lacks_one=yes ;;
        esac
    done
    [ -z "$lacks_one" ] || echo "$has"
}

# Installs what setup.cfg names with the extras $2, torch first, so that a build that is already there satisfies
# everything after it.
install_packages() {
    local venv=$1 extras=$2 constraints=$1/constraints.txt torch_here
    if torch_here=$(installed_torch "$venv/bin/python"); then
        sed "s/^torch==.*/torch==${torch_here%% *}/" constraints.txt >"$constraints"
    else
        cp constraints.txt "$constraints"
        say "Installing $(grep '^torch==' constraints.txt) (the largest download; which build is up to pip's configured index)"
        "$venv/bin/python" -m pip install -c "$constraints" torch || fail "torch could not be installed: see pip's message above"
    fi
    say "Installing the other packages, in the versions of constraints.txt"
    # setuptools first: without build isolation nothing is fetched when everything is already there.
    "$venv/bin/python" -m pip install -c "$constraints" setuptools || fail "setuptools could not be installed"
    "$venv/bin/python" -m pip install -c "$constraints" --no-build-isolation -e ".[$extras]" \
        || fail "the packages could not be installed: see pip's message above"
    "$venv/bin/python" -c 'import torch, transformers, deepspeed' || fail "the packages were installed but cannot be imported"
    { environment_stamp; echo "$extras"; } >"$venv/llava_saep.stamp"
}

# Activates the environment; makes or updates it first when that is needed. Arguments: the extras that must be there.
use_environment() {
    local venv=${LLAVA_SAEP_VENV:-.venv} python extras
    # `activate` is the last thing that venv writes.
    if [ "$(cat "$venv/made_by_llava_saep" 2>/dev/null)" != "$(pwd)" ] || [ ! -f "$venv/bin/activate" ]; then
        python=$(find_python) || true
        [ -n "$python" ] || fail "Python 3.11 or newer with its venv module is needed; found $(python3 --version 2>&1 || echo none). \
Install it (Debian and Ubuntu: apt install python3.11 python3.11-venv), or name one with LLAVA_SAEP_PYTHON."
        create_environment "$python" "$venv"
    fi
    extras=$(extras_to_install "$venv" "$@")
    if [ -z "$extras" ]; then
        say "Using the Python environment in $venv"
    else
        install_packages "$venv" "$extras"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
}
