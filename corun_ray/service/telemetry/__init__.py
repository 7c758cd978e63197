"""What a run tells of itself: console, log files, and Prometheus metrics."""
