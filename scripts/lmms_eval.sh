#!/usr/bin/env bash
# An environment for lmms-eval, which wants other libraries than this project: ./scripts/lmms_eval.sh FOLDER
#
# It takes torch, transformers and llava-saep from the environment of this checkout (.venv, or the python3 on the PATH)
# through a path file, and adds lmms-eval without the dependencies that would bring another torch and CUDA.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER   (new; afterwards FOLDER/bin/python -m lmms_eval --model llava_saep ...)" >&2
    exit 2
fi
folder=$1
root=$(cd "$(dirname "$0")/.." && pwd)
base=$root/.venv/bin/python
[ -x "$base" ] || base=$(command -v python3)
site=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$base" -c 'import torch, transformers' || { echo "$base has no torch and transformers; run ./quickstart.sh first" >&2; exit 2; }

# Versions that the base already has are named, so that pip leaves torch alone.
pinned=$("$base" -c '
from importlib.metadata import version
print(*(f"{name}=={version(name)}" for name in ("peft", "transformers", "accelerate", "numpy", "pillow", "protobuf")))')

"$base" -m venv "$folder"
own_site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Not the folder alone: its own path files, where there are some, count too.
echo "import site; site.addsitedir('$site')" > "$own_site/zz_base_environment.pth"
"$folder/bin/pip" install --no-deps lmms-eval==0.7.3
# shellcheck disable=SC2086
"$folder/bin/pip" install $pinned loguru jsonlines evaluate pytablewriter sacrebleu tenacity tqdm-multiprocess zstandard \
    python-dotenv numexpr scikit-learn aiohttp einops openai httpx datasets==5.2.0
"$folder/bin/python" -c 'import lmms_eval, torch; print("lmms-eval is in '"$folder"', with torch", torch.__version__)'
