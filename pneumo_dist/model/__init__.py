"""The network, its ImageNet weights and the model file."""
