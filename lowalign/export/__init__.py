"""From an adapter to what others load: plain weights that are proved to be the model that was trained."""
