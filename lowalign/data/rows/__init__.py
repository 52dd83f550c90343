"""What a row of a file means: shapes, turns, preferences, votes. Knows no tokens."""
