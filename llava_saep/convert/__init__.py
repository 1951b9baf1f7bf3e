"""Checkpoints out: our format, the original LLaVA's, llava-hf's, and projector weights alone.

What comes in is read by `llava_saep.model`, which loads all three formats; every writer starts from a loaded model.
"""
