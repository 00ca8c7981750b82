"""How does a start run? Checks, processes, and what is handed from one to the next."""
