"""How the next token is chosen from logits: penalties, bans, cut-offs, the draw, guidance."""
