"""What is called: case tokens, the plan of each level, and the values that a token stands for."""
