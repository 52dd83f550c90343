"""A page about runs: their curves, options, data and samples, from the files that they wrote."""
