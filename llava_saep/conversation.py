"""LLaVA's conversations under their names there (`llava.conversation`)."""

from llava_saep.data.llava_conversation import Conversation, SeparatorStyle, conv_templates, default_conversation

__all__ = ["Conversation", "SeparatorStyle", "conv_templates", "default_conversation"]
