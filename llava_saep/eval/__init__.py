"""LLaVA's evaluation scripts under its names, to be run as `python -m llava_saep.eval.model_vqa` and so on.

Thin: flags on top of `llava_saep.generation` and `llava_saep.evaluation`, which is the package to build on.
"""
