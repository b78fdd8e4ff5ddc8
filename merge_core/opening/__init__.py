"""From what somebody has to a suite: finding models, naming tasks, presets."""
