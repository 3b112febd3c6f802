"""Where gradients flow and end, as a table, a margin, a picture, and as contracts."""
