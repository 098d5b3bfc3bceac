"""Parameter servers: what they hold, and how workers push to and pull from them."""
