"""What the commands of `trl-rewards` run, a module each; beside them what only commands need."""
