"""One training loop for every stage, and the objectives that it minimises."""
