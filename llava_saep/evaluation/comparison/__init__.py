"""Several projectors, or several trained models, put the same questions: runs, statistics, and one report of them.

What is trained is a recipe's (`recipe.py`), which a file holds: this package knows no data set and no sizes. Each run
is a folder, and a step's record appears when the step is finished, so that a killed comparison goes on where it was.
"""
