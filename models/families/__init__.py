"""Network families: one module each, builders with their numbers in sight."""
