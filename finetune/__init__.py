"""Fine-tuning of yes/no cross-encoders: a command line, not a Python API."""
