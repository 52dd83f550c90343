"""One file per verb of the command line. The verbs that train connect a method with its data."""
