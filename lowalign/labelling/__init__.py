"""Judgements of people: what is shown, what is kept on disk, the local web page, and the agreement between annotators."""
