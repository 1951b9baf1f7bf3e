"""Where several benchmarks' files come from, as `llava-saep eval doctor` says it."""

EVAL_ZIP = (
    "eval.zip of LLaVA's Evaluation guide (https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy), "
    "extracted to --data-dir (default: playground/data/eval)"
)
COCO_IMAGES = "http://images.cocodataset.org/zips"

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA appends to a question whose answer is short."""
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA's instruction for multiple choice."""
