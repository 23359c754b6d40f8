"""Many runs: a grid of configs, what is to be run of it, and workers on one machine or a cluster."""
