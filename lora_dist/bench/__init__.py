"""This project and its peers timed side by side: same weights, rows, dtype, optimizer and steps, turn by turn."""
