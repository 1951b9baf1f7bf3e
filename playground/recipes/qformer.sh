#!/usr/bin/env bash
# A Q-Former: playground/recipes/qformer.sh STAGE [flags]. Hyper-parameters and data are LLaVA-1.5's; BLIP-2 and
# InstructBLIP train theirs otherwise. Its tokens form no map: MERGE_TYPE=flat with finetune_anyres.
set -euo pipefail
PROJECTOR=qformer exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
