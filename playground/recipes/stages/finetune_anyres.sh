#!/usr/bin/env bash
# Stage 2 on images that are cut into crops, as LLaVA-1.6 sees them. LLaVA-1.6's own script was not published; rate, crops
# and merging are those of scripts/train/finetune_clip.sh in LLaVA-VL/LLaVA-NeXT, the batch is LLaVA-1.5's. Otherwise
# there: the tower learns too, at 2e-6 (there is no rate of its own for it here, so it stays frozen), and the context is
# Qwen2's 32,768 (Vicuna's 4,096 holds the 2,880 patches of an image and a conversation).
# Projectors whose tokens form no map (qformer, resampler, ...) need MERGE_TYPE=flat.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 128 4 \
    --deepspeed deepspeed_configs/zero3.json \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --pretrain_mm_mlp_adapter "$STAGE1_DIR" \
    --version "$TEMPLATE" \
    "${CONVERSATIONS[@]}" \
    --image_aspect_ratio anyres \
    --image_grid_pinpoints "[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]" \
    --mm_patch_merge_type "${MERGE_TYPE:-spatial_unpad}" \
    --group_by_modality_length True \
    --learning_rate 1e-5 \
    --model_max_length 4096 \
    --output_dir "${OUTPUT_DIR:-./checkpoints/$NAME-anyres}" \
    "$@"
