"""fastis in the loops of others: one module a library, imported only when asked for."""
