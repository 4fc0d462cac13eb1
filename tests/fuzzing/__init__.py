"""Random model/guide pairs against a slow and simple reference: ``python -m tests.fuzzing --help``."""
