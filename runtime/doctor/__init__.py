"""What this machine can do: facts gathered from it, and findings with remedies judged from them."""
