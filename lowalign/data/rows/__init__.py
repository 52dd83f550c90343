"""What a row of a file means: formats, turns, preferences, votes. Knows no tokens."""
