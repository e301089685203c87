"""Two models' answers rated by people, who are not told which is which: the sheets, and what they show."""
