"""PPO with one controller, in the shape of verl, every row going through the queue: `python -m recipe.verl_style`."""
