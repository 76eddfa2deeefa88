"""The parts of `scripts/train_tiny_models.py`: the text, the two model forms, the training, the routing figures."""
