"""What does each command do? One function each, which gives the process's exit code."""
