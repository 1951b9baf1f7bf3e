"""Training steps measured side by side with transformers' own Llava under its own Trainer.

`benchmark` plans and runs the sides, each in a process of its own (`side`); the other modules hold what both need.
"""
