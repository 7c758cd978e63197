"""One training step: its losses, the rule of the label pool, the state, and checkpoints."""
