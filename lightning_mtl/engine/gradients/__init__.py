"""Task gradients: rows and heads, where they live, and which parameters are shared."""
