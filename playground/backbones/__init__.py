"""Stand-ins for LLaVA's pretrained parts: a small vision tower and a small chat language model, with their recipes.

`vision_tower/` and `language_model/` hold the shipped weights; `python -m playground.backbones` makes them again.
"""
