"""The magnitude of weights: sweeps, homogeneity, norms, robustness, calibration."""
