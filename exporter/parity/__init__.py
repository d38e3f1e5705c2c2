"""Proof: metrics, the reference walk and what to make of them."""
