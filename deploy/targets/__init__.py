"""What each target changes in the exported graph."""
