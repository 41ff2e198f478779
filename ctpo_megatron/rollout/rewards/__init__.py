"""What answers are worth: one file for each kind of reward, put together by `opening`."""
