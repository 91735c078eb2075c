"""The process of a run: sends its steps, hears of them, judges what was lost."""
