"""minrnn's models in the classes of other libraries, each of which is an extra."""
