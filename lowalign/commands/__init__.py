"""One file per verb of the command line: it wires a method to its data, or does what the verb says."""
