"""From an adapter to what others load: plain weights that are compared with the trained model."""
