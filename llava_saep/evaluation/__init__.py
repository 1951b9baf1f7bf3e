"""Answers to benchmarks and files of questions, scored per kind of question, reported as table, JSON and Markdown.

Question and answer files are LLaVA's (`question_id`, `image`, `text`, `category`; `question_id`, `prompt`, `text`), so
that files made for LLaVA's own scripts can be read. A question may add `answer`, the words that a right answer ends
with.
"""
