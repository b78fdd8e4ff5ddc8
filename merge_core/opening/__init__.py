"""Making suites of models at hand: finding models, naming tasks, presets."""
