"""Verify a results folder, apart from the code that made it: `python -m mobie check results/`.

Records, checkpoints, inputs, tables and figures are read with parsers of this package and judged by sums done here:
hashes, the bytes behind the bits, means and standard errors behind the values. Only what has to know the suite's
configuration (which records a table reads) uses the suite's own readers. No model is loaded, torch is not imported.
"""
