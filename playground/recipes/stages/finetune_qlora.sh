#!/usr/bin/env bash
# Stage 2 with adapters on a language model that is kept in 4 bits (QLoRA), for small GPUs; needs bitsandbytes. LLaVA-1.5
# has no script for it: these are the values of its finetune_lora.sh, with the --bits 4 and the ZeRO-2 of LLaVA-1's
# scripts/finetune_qlora.sh (ZeRO-3 cannot split 4-bit weights).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 128 16 \
    --deepspeed deepspeed_configs/zero2.json \
    --bits 4 \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --pretrain_mm_mlp_adapter "$STAGE1_DIR" \
    --version "$TEMPLATE" \
    "${CONVERSATIONS[@]}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-4 \
    --output_dir "${OUTPUT_DIR:-./checkpoints/$NAME-qlora}" \
    "$@"
