"""What backs every speed claim: scripts that measure this loader beside others, in the same run."""
