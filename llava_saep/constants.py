"""Token strings and index values that LLaVA's data, checkpoints and downstream code rely on."""

IGNORE_INDEX = -100
"""Label of a position that takes no part in the loss (PyTorch's default ignore_index)."""

IMAGE_TOKEN_INDEX = -200
"""What LLaVA writes into input_ids in place of an image; never an index into an embedding matrix."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
