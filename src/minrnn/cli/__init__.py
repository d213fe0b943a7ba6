"""The command line: one file a verb. Nothing here imports torch until a verb that needs it runs."""
