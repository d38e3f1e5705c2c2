"""Which operator, weight or table made a package miss its limits."""
