"""The engine process: one stock scheduler per layout behind a facade, and what a switch does to them."""
