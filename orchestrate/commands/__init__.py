"""The verbs of the command line, a module a subject. Nothing heavy is imported before a verb is known."""
