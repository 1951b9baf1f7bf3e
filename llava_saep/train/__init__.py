"""Training: HF's Trainer under DeepSpeed, with LLaVA's stages and complete checkpoints."""
