"""The folder of a run: its record and the images of its validation sets."""
