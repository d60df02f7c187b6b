// Heads, keys and values, and attention.
