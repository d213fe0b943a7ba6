"""Layers and models in the forms that other libraries ask for, one module for each library."""
