"""How a run proceeds."""
