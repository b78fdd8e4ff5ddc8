"""Methods compared: settings tuned, run on the same images, with their costs."""
