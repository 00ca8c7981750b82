"""What did the user ask for? The environment and the arguments become Settings and a LaunchPlan."""
