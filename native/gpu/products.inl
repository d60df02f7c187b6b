// Activations as codes, and products with matrices of every layout.
