"""What a command measures after training, and the tables and plots that it writes."""
