"""Chat templates: the text that transformers would make of a conversation, within bounds."""
