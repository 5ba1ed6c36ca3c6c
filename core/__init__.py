"""What several packages need and must agree on. Imports none of the others."""
