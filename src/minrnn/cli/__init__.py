"""The command line: one module per command. torch is imported only when a command needs it."""
