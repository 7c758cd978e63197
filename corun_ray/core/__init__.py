"""The method itself: numpy, torch and opencv only, so that it also runs in a notebook or on a bare GPU machine."""
