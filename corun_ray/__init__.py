"""corun_ray: a training service for real-world image dehazing (CORUN and Colabator) on Ray clusters."""
