"""Where rows come from: files, folders, standard input and the Hub, each row with its place. Knows no columns."""
