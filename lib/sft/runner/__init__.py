"""The planner, the stage runner and the command line of every program in the environment."""
