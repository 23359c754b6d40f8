"""Our strategies against Avalanche 0.6.0's of the same methods: `clstream parity`.

`methods` says what is compared, and made the same; `measuring` runs and judges it.
"""
