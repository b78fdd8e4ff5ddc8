"""Whether models belong together: by the files beside their weights, and by the weights."""
