"""How fast is this loader? Scripts that measure it and others in the same run."""
