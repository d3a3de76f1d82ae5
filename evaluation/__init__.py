"""How samples are judged and speed is estimated, and the tables and plots of both."""
