"""The tiny world behind `lowalign demo`: its grammar, its exact score, and the small base that learned it."""
