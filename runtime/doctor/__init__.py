"""What this machine can do: facts gathered from it, findings judged from them, what mends each."""
