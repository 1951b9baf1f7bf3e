#!/usr/bin/env bash
# Stage 1: the projector alone learns from 558,000 captions. LLaVA's scripts/v1_5/pretrain.sh: batch 256, rate 1e-3.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 256 32 \
    --deepspeed deepspeed_configs/zero2.json \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --version plain \
    --tune_mm_mlp_adapter True \
    --data_path "${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-./playground/data/LLaVA-Pretrain/images}" \
    --learning_rate 1e-3 \
    --output_dir "${OUTPUT_DIR:-$STAGE1_DIR}" \
    "$@"
