"""Which files and architectures are admitted."""
