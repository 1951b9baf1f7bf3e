#!/usr/bin/env bash
# Stage 2 with low-rank adapters in place of the language model's own weights. LLaVA's scripts/v1_5/finetune_lora.sh:
# batch 128, rank 128, alpha 256, rate 2e-4, projector 2e-5.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 128 16 \
    --deepspeed deepspeed_configs/zero3.json \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --pretrain_mm_mlp_adapter "$STAGE1_DIR" \
    --version "$TEMPLATE" \
    "${CONVERSATIONS[@]}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-4 \
    --output_dir "${OUTPUT_DIR:-./checkpoints/$NAME-lora}" \
    "$@"
