"""The parts of the page Open checkpoints."""
