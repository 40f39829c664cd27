"""Search method, learning rate, places and width within a budget."""
