"""An adapter or a model to and from the Hub: what is published, its card, and the comparison with what arrived."""
