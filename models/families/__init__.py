"""Network families: one module each, builders with explicit numbers."""
