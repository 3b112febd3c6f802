"""See where gradients flow, and test it."""
