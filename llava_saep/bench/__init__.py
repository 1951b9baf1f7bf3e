"""Measurements of speed and memory: of projectors, which need torch alone, and of training steps.

Plots need matplotlib (the extra `bench`).
"""
