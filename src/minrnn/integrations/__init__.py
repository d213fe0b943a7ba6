"""Layers and models in the forms that other libraries ask for, each of which is an extra."""
