"""What this machine can do: facts about it, findings derived from them, and remedies."""
