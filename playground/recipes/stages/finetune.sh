#!/usr/bin/env bash
# Stage 2: projector and language model learn from 665,000 conversations. LLaVA's scripts/v1_5/finetune.sh: batch 128,
# rate 2e-5.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 128 16 \
    --deepspeed deepspeed_configs/zero3.json \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --pretrain_mm_mlp_adapter "$STAGE1_DIR" \
    --version "$TEMPLATE" \
    "${CONVERSATIONS[@]}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-5 \
    --output_dir "${OUTPUT_DIR:-./checkpoints/$NAME}" \
    "$@"
